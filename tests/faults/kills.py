"""SIGKILL at random moments of a training; then its files are read and the training resumes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import fimprobe
from fimprobe.sinks import jsonl
from tests.faults.outcome import Outcome
from tests.faults.training import Training, left_behind, messages, mlp, open_files

STEPS = 12


def kills(times: int = 50) -> Outcome:
    """Kill forked trainings; no report that was written may be lost, and each can be resumed."""
    outcome, moments = Outcome("SIGKILL at a random moment", told_once=None), random.Random(3)
    Training(mlp).train()  # what is imported and started at first is so in every fork
    longest = 0.5
    for number in range(times):
        folder = Path(tempfile.mkdtemp())
        reader, writer = os.pipe()
        started = time.perf_counter()
        child = os.fork()
        if not child:
            _train_until_killed(folder, reader, writer)
        os.close(writer)
        os.read(reader, 1)  # it begins
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        announced = b""
        while piece := os.read(reader, 4096):
            announced += piece
        os.close(reader)
        written = [int(x) for x in announced.decode().split("\n")[:-1] if x]
        if len(written) == STEPS:  # it ended before it was killed
            longest = min(longest, time.perf_counter() - started)
        outcome.count(f"kill {number}", _faults_of_resuming(folder / "a", written))
        shutil.rmtree(folder)
    outcome.note = f"killed within {longest:.2f} s"
    return outcome


def _train_until_killed(folder: Path, reader: int, writer: int) -> None:
    os.close(reader)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.write(writer, b"\n")
    write = jsonl.JsonlSink.write

    def write_and_announce(self: Any, report: fimprobe.Report) -> None:
        write(self, report)
        os.write(writer, f"{report.step}\n".encode())

    jsonl.JsonlSink.write = write_and_announce  # type: ignore[method-assign]
    training = Training(mlp)
    training.attach(folder / "a", schedule={"every": 1})
    training.train(STEPS)
    training.probe.detach()
    os._exit(0)


def _faults_of_resuming(folder: Path, written: list[int]) -> list[str]:
    path, faults = folder / "fimprobe.jsonl", []
    num_files = open_files()

    def steps() -> set[int]:
        try:
            return {record["step"] for record in fimprobe.read(path)}
        except fimprobe.FimprobeError:
            return set()  # there is no report yet

    try:
        if not set(written) <= steps():
            faults.append(f"written {written}, read {sorted(steps())}")
        first = len(written)
        training = Training(mlp)
        training.train(first)
        with messages() as lines:
            training.attach(folder, schedule={"every": 1}, first_step=first)
            training.train(first + 2)
            training.probe.detach()
        if steps() != {*range(first + 2)}:
            faults.append(f"resumed at {first}, read {sorted(steps())}")
        if lines:
            faults.append(f"told {lines}")
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults + left_behind(num_files, 1000)
