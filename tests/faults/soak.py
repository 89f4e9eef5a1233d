"""Long use in one process: cycles, steps, threads and forks, with the memory that they leave."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F

import fimprobe
from tests.faults.outcome import Outcome
from tests.faults.training import (
    Training,
    batch,
    differences,
    left_behind,
    messages,
    mlp,
    open_files,
    plain_state,
)

LEAN = {"likelihood": "categorical", "second_order": "off", "bounds": False}


def resident_mb() -> float:
    """Memory of this process in the RAM, after garbage is collected."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cycles(times: int = 500) -> Outcome:
    """Attach and detach; every third probe is dropped with its model, every fifth replaced."""
    outcome = Outcome("attach and detach", told_once=None)
    num_files, num_threads = open_files(), threading.active_count()
    with tempfile.TemporaryDirectory() as folder, messages():
        for number in range(times):
            training, faults = Training(mlp), []
            for again in range(1 + (number % 5 == 0)):
                training.attach(Path(folder) / f"{number}-{again}", **LEAN)
            training.train(1)
            if len(training.probe.history) != 1:
                faults.append("no report")
            if number % 3:
                training.probe.detach()
            del training
            outcome.count(f"cycle {number}", faults)
            if number == times // 5:
                before = resident_mb()
    growth = resident_mb() - before
    outcome.note = f"{growth:+.1f} MB resident over the last {times - times // 5}"
    left = left_behind(num_files, num_threads)
    if growth > 20:
        left.append(f"memory grew by {growth:.0f} MB")
    outcome.problems += left
    return outcome


def steps(times: int = 3000) -> Outcome:
    """Measure at every step; the training is bit-identical and memory stays."""
    outcome = Outcome("probed step", told_once=None)
    plain, training = Training(mlp), Training(mlp)
    with tempfile.TemporaryDirectory() as folder, messages() as lines:
        training.attach(Path(folder) / "a", schedule={"every": 1}, **LEAN)
        # the history keeps 1,000 reports: memory grows until it is full
        full = min(1100, times // 2)
        training.train(full)
        before = resident_mb()
        training.train(times)
        growth = resident_mb() - before
        reports = training.probe.last.step + 1
        training.probe.detach()
    plain.train(times)
    faults = differences(training.state(), plain.state())
    if lines or reports != times:
        faults.append(f"{reports} reports, told {lines}")
    if growth > 20:
        faults.append(f"memory grew by {growth:.0f} MB")
    outcome.injected, outcome.survived = times, times if not faults else 0
    outcome.problems = faults
    outcome.note = f"{growth:+.1f} MB resident over the last {times - full}"
    return outcome


def threads(times: int = 20) -> Outcome:
    """Three trainings at once, each with a probe that is attached and detached again and again."""
    outcome = Outcome("training in a thread among three", told_once=None)
    results: list[list[str]] = []

    def run() -> None:
        # models are made one at a time: the numbers of their weights are drawn from one stream
        faults = []
        for _ in range(times):
            generator = torch.Generator().manual_seed(1)
            finals = []
            for probed in (False, True):
                weight = torch.randn(3, 4, generator=generator.manual_seed(1))
                net = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
                net[0].weight = torch.nn.Parameter(weight)
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
                probe = (
                    fimprobe.attach(net, tensorboard=False, schedule={"every": 1}, **LEAN)
                    if probed
                    else None
                )
                try:
                    for step in range(3):
                        x, y = batch(step)
                        optimizer.zero_grad()
                        F.cross_entropy(net(x), y).backward()
                        optimizer.step()
                except Exception as error:
                    faults.append(f"{type(error).__name__} reached the training: {error}")
                if probe is not None:
                    if len(probe.history) != 3:
                        faults.append(f"{len(probe.history)} reports")
                    probe.detach()
                finals.append(net[0].weight.detach().numpy().tobytes())
            if finals[0] != finals[1]:
                faults.append("differs")
        results.append(faults)

    with messages() as lines:
        running = [threading.Thread(target=run) for _ in range(3)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(600)
    for number, faults in enumerate(results):
        outcome.count(f"thread {number}", faults)
    outcome.injected *= times
    outcome.survived *= times
    outcome.problems += [f"told {lines}"] * bool(lines) + ["a thread hangs"] * (len(results) < 3)
    return outcome


def forks(times: int = 10) -> Outcome:
    """Fork while a probe is attached: the child trains on, and the parent keeps its files."""
    outcome = Outcome("fork of a probed training", told_once=None)
    expected, weights = plain_state(mlp), list(mlp().state_dict())
    for number in range(times):
        with tempfile.TemporaryDirectory() as folder, messages():
            training, faults = Training(mlp), []
            training.attach(Path(folder) / "a", schedule={"every": 1}, **LEAN)
            training.train(2)
            child = os.fork()
            if not child:
                code = 1
                try:
                    training.train()
                    training.probe.detach()
                    final = training.state()  # Python seeds its own stream anew in a fork
                    code = 0 if all(final[name] == expected[name] for name in weights) else 2
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code:
                faults.append(f"the child ended with {code}")
            training.train()
            training.probe.detach()
            faults += differences(training.state(), expected)
            read = sorted({record["step"] for record in fimprobe.read(Path(folder) / "a")})
            if read != [0, 1, 2, 3]:
                faults.append(f"read {read}")
            outcome.count(f"fork {number}", faults)
    return outcome
