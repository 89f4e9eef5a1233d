"""Processes that measure together: real ones, over gloo, started once for all checks."""

import contextlib
import copy
import json
import logging
import math
import os
import random
import runpy
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fimprobe
from fimprobe.distributed import processes as ranks
from fimprobe.estimators import reliability
from fimprobe.probe import run_account, step_cycle
from tests.support.agreement import flat
from tests.support.bit_identity import same
from tests.support.paths import EXAMPLES
from tests.support.processes import free_port, start_processes, torchrun_environment

LEAN = {"likelihood": "categorical", "tensorboard": False, "estimators": ["i1"], "bounds": False}


# -- what the processes do ------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))


def numbers(report):
    """All numbers and words of a report but the time it took."""
    return {k: v for k, v in flat(report.to_dict()).items() if k != "/seconds"}


def data(size, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, generator=generator)


def heard(act):
    """What the logger says meanwhile, the result, and the seconds it took."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("fimprobe")
    logger.addHandler(handler)
    logger.propagate = False
    started = time.perf_counter()
    try:
        result = act()
    finally:
        logger.removeHandler(handler)
    return SimpleNamespace(result=result, lines=lines, seconds=time.perf_counter() - started)


def measure_shares(rank, size, out):
    """The report of shares, and of the whole by one process; then with every number in it."""
    group, x, found = ranks.join_processes(), data(7, 5).double(), []
    parts = torch.tensor_split(x, [3] if size == 2 else [1, 3, 6])
    cases = [(2, False), ("exact", True), (2, True), ("exact", False)]
    withhold = reliability.withhold
    for draws, raw in cases if size == 2 else cases[:2]:
        options = {"likelihood": "categorical", "draws": draws, "estimators": ("i1", "i2", "ih")}
        options |= {"seed": 5, "diagonals": True}
        reliability.withhold = (lambda estimate, **_: estimate) if raw else withhold
        shared = fimprobe.measure(net().double(), parts[rank], ranks=group, **options)
        whole = fimprobe.measure(net().double(), x, **options)
        found.append((numbers(shared), numbers(whole)))
        for name, want in whole.total.i2.diagonal.items():
            have = shared.total.i2.diagonal[name]
            found[-1][0][name], found[-1][1][name] = float(have.norm()), float(want.norm())
            assert torch.allclose(have, want, rtol=1e-10, atol=1e-13)
    reliability.withhold = withhold
    return found


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
    )


def train(rank, size, out=None):
    """A DDP training of 6 steps whose last batch is uneven; with a probe where ``out`` is given."""
    torch.manual_seed(10 + rank)
    random.seed(10 + rank)
    inner = normed()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    probe, wanted, trace = None, [], []
    if out is not None:
        options = {"schedule": {"every": 2}, "on_error": "raise", "log_dir": out / f"log{rank}"}
        probe = fimprobe.attach(model, batch=100, **options)
    for step in range(7):
        x = data(4 * size, 5, seed=step)[rank * 4 : rank * 4 + 4]
        whole = data(4 * size, 5, seed=step)
        if step == 6 and rank > 0:
            x = x[: rank + 1]
        if step == 6:
            whole = torch.cat([whole[:4], *(whole[4 * r : 5 * r + 1] for r in range(1, size))])
        y = torch.arange(len(x)) % 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = copy.deepcopy(inner)
        optimizer.step()
        trace.append([p.detach().clone() for p in model.parameters()])
        if probe is not None and step % 2 == 0:
            assert len(probe.history) == step // 2 + 1
            shared = probe.history[-1]
            alone = fimprobe.measure(
                before, whole, likelihood="categorical", seed=1_000_003 * step, step=step
            )
            wanted.append((numbers(shared), numbers(alone)))
    if probe is not None:
        probe.detach()
    state = {k: v.clone() for k, v in inner.state_dict().items()}
    left = (trace, state, optimizer.state_dict(), torch.get_rng_state(), random.getstate())
    return left, wanted, None if probe is None else (probe.decision, probe.log_dir)


def train_twice(rank, size, out):
    plain, _, _ = train(rank, size)
    probed, wanted, (decision, log_dir) = train(rank, size, out)
    again, _, _ = train(rank, size)
    changed = not same(train(rank + 1, size)[0], plain)
    return {
        "same": same(plain, probed) and same(plain, again),
        "changed": changed,
        "reports": wanted,
        "decision": decision,
        "log_dir": log_dir,
        "files": sorted(str(p.relative_to(out)) for p in out.glob("log*/*")),
    }


def keep_a_budget(rank, size, out):
    """Steps of 4 ms and a clock of rank 1's that is wrong; the steps of the reports."""
    real, ticks = time.perf_counter, iter(range(10**9))
    if rank == 1:
        wrong = SimpleNamespace(perf_counter=lambda: real() + 0.02 * next(ticks))
        run_account.time = step_cycle.time = wrong
    model = net()
    try:
        with fimprobe.attach(model, **LEAN, schedule={"budget": 0.2}) as probe:
            account = probe.schedule.account
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            for step in range(500):
                time.sleep(0.004)
                F.cross_entropy(model(data(4, 5)), torch.arange(4) % 3).backward()
                optimizer.step()
            steps = [r.step for r in probe.history]
            return {"steps": steps, "share": account.spent / (account.spent + account.elapsed)}
    finally:
        run_account.time = step_cycle.time = time


def meet_nan(rank, size, out):
    """At step 1 the last process's batch holds NaN; steps 0 and 2 are fine."""

    def act():
        model = net()  # a probe keeps no model alive
        with fimprobe.attach(model, **LEAN) as probe:
            for step in range(3):
                x = data(3, 5)
                if step == 1 and rank == size - 1:
                    x[1] = math.nan
                probe.step(x)
            return [r.step for r in probe.history], probe.active, probe.last.batch_size

    return heard(act)


def fail(error, where, culprit):
    """One process fails at step 1, in the measurement or before it; training continues."""

    def check(rank, size, out):
        from fimprobe.measurement import process_share as measurement

        def act():
            model = net()
            options = LEAN | {"schedule": {"every": 1}}
            probe = fimprobe.attach(model, mask=mask if where == "mask" else None, **options)
            model = DistributedDataParallel(model) if where == "mask" else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            plain = measurement.measure_and_check
            for step in range(4):
                if step == 1 and rank == culprit and where == "measurement":
                    measurement.measure_and_check = broken
                probe._cycle.capture.model(data(3, 5)).sum().backward()
                optimizer.step()
                measurement.measure_and_check = plain
                calls.append(step)
            probe.detach()
            return [r.step for r in probe.history], probe.active, calls

        calls = []

        def broken(*args):
            raise error

        def mask(args, kwargs):
            if calls and rank == culprit:
                raise error
            return torch.ones(3, dtype=torch.bool)

        return heard(act)

    return check


def unmet(rank, size, out):
    """Only rank 0 attaches; then the other one does, too late."""
    patience, ranks.JOIN_TIMEOUT_SECONDS = ranks.JOIN_TIMEOUT_SECONDS, 1.0
    try:

        def act():
            model = net()
            with fimprobe.attach(model, log_dir=out / f"unmet{rank}") as probe:
                F.cross_entropy(model(data(4, 5)), torch.arange(4) % 3).backward()
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                return probe.active, probe.history, probe.log_dir

        if rank == 0:
            first = heard(act)
        dist.barrier()
        if rank > 0:
            first = heard(act)
        dist.barrier()
        return first
    finally:
        ranks.JOIN_TIMEOUT_SECONDS = patience


def late(rank, size, out):
    """One process attaches half a second after the other."""
    time.sleep(0.5 * rank)
    model = net()
    with fimprobe.attach(model, **LEAN) as probe:
        probe.step(data(2 + rank, 5))
        return probe.last.batch_size


def unlike(rank, size, out):
    """Models that are not kept the same."""

    def act():
        model = net()
        with torch.no_grad():
            model[2].weight.mul_(1 + rank)
        with fimprobe.attach(model, **LEAN) as probe:
            probe.step(data(2, 5))
            return probe.active, probe.history

    return heard(act)


def stay_away(seconds):
    """Process 1 does not come back from its measurement in time (or at all)."""

    def check(rank, size, out):
        timeout, ranks.MEASUREMENT_TIMEOUT_SECONDS = ranks.MEASUREMENT_TIMEOUT_SECONDS, 1.5

        def act():
            model = net()
            with fimprobe.attach(model, **LEAN) as probe:
                probe.step(data(2, 5))
                for step in range(3):
                    if rank == 1 and step == 0:
                        time.sleep(seconds) if seconds else os._exit(7)
                    probe.step(data(2, 5))
                return [r.step for r in probe.history], probe.active

        try:
            return heard(act)
        finally:
            ranks.MEASUREMENT_TIMEOUT_SECONDS = timeout

    return check


SHARED = {"shares": measure_shares, "training": train_twice}
PAIR = SHARED | {
    "budget": keep_a_budget,
    "nan": meet_nan,
    "memory": fail(torch.OutOfMemoryError("no room"), "measurement", 1),
    "callback": fail(ValueError("a broken mask"), "mask", 0),
    "unlike": unlike,
    "late": late,
    "unmet": unmet,
    "slow": stay_away(2.5),
    "dies": stay_away(0),
}


def work(rank, size, out, where):
    """All checks, in order; each process leaves what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    for name, check in (PAIR if size == 2 else SHARED).items():
        folder = out / name
        folder.mkdir(exist_ok=True)
        try:
            found = check(rank, size, folder)
        except Exception:
            found = traceback.format_exc()
        torch.save(found, out / f"{name}{rank}.pt")
        if name != "dies":
            dist.barrier()
    dist.destroy_process_group()


# -- what they found ------------------------------------------------------------------------


class World:
    def __init__(self, size, out, where):
        self.size, self.out = size, out
        self.context = start_processes(work, (size, out, where), size)

    def found(self, name):
        results = []
        for rank in range(self.size):
            path = self.out / f"{name}{rank}.pt"
            results.append(torch.load(path, weights_only=False) if path.exists() else None)
            assert not isinstance(results[-1], str), results[-1]
        return results


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """2 processes that meet over TCP, 4 over a file."""
    out = {n: tmp_path_factory.mktemp(f"world{n}") for n in (2, 4)}
    made = {2: World(2, out[2], f"tcp://127.0.0.1:{free_port()}")}
    made[4] = World(4, out[4], f"file://{out[4]}/meeting")
    for world in made.values():
        for process in world.context.processes:
            process.join(60)
            if process.is_alive():
                process.kill()
                process.join()
    return made


def assert_equal(pairs, rel):
    for have, want in pairs:
        assert have.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, float):
                assert have[key] == pytest.approx(value, rel=rel, abs=0, nan_ok=True), key
            elif not key.startswith("/advice"):
                assert have[key] == value, key


@pytest.mark.parametrize("size", [2, 4])
def test_the_report_of_shares_is_that_of_the_whole(worlds, size):
    results = worlds[size].found("shares")
    for found in results:
        assert len(found) == {2: 4, 4: 2}[size] and len(found[0][0]) > 400
        assert_equal(found, 1e-10)
        for (have, _), (first, _) in zip(found, results[0], strict=True):
            assert have == first


@pytest.mark.parametrize("size", [2, 4])
def test_training_is_bit_identical_and_rank_0_writes(worlds, size):
    results = worlds[size].found("training")
    last = {2: 4 + 2, 4: 4 + 2 + 3 + 4}[size]
    for rank, found in enumerate(results):
        assert found["same"] and found["changed"]
        reports = [have for have, _ in found["reports"]]
        assert [r["/batch_size"] for r in reports] == [4 * size] * 3 + [last]
        assert reports == [have for have, _ in results[0]["reports"]]
        assert "cross-entropy" in found["decision"]
        assert (found["log_dir"] is None) == (rank > 0)
        assert {Path(f).parent.name for f in found["files"]} == {"log0"}
    # the model is rank 0's, running statistics included; float32, sums in another order
    known = {}
    for have, want in results[0]["reports"]:
        for key in ("trace", "label_variance", "std_error", "total_label_variance", "bound"):
            for kind in ("i1", "i2"):
                key_of = f"/total/{kind}/{key}"
                if want[key_of] is None:  # and why
                    assert have[key_of] is None and have[f"/total/{kind}/unknown/{key}"], key_of
                else:
                    assert have[key_of] == pytest.approx(want[key_of], rel=1e-4, abs=0), key_of
                    known[kind, key] = known.get((kind, key), 0) + 1
    assert len(known) == 10 and min(known.values()) >= 2, known


def test_a_budget_is_agreed_on(worlds):
    first, second = worlds[2].found("budget")
    assert first["steps"] == second["steps"] and len(first["steps"]) > 2
    assert first["share"] < 0.4  # steps become shorter than was foreseen: some slack


def test_a_batch_that_one_process_cannot_measure_is_skipped_by_all(worlds):
    first, second = worlds[2].found("nan")
    for found in (first, second):
        assert found.result == ([0, 2], True, 6)
        assert len(found.lines) == 1 and "step 1 was not probed" in found.lines[0]
        assert "3 of 9 outputs are not finite" in found.lines[0]
    assert "process 1: " in first.lines[0] and "process 1" not in second.lines[0]


@pytest.mark.parametrize(
    ("name", "says", "culprit"), [("memory", "no room", 1), ("callback", "a broken mask", 0)]
)
def test_an_error_in_one_process_ends_all_probes_and_no_training(worlds, name, says, culprit):
    for rank, found in enumerate(worlds[2].found(name)):
        steps, active, calls = found.result
        assert (steps, active, calls) == ([0], False, [0, 1, 2, 3])
        assert len(found.lines) == 1 and says in found.lines[0]
        assert "probing ended at step 1, training continues" in found.lines[0]
        assert (f"process {culprit}: " in found.lines[0]) == (rank != culprit)


def test_models_that_differ_are_not_merged(worlds):
    for found in worlds[2].found("unlike"):
        assert found.result == (False, [])
        assert "'2.weight' must be equal in all processes, but process 1" in found.lines[0]


def test_a_late_process_is_waited_for(worlds):
    assert worlds[2].found("late") == [5, 5]


def test_a_process_that_attaches_alone_trains_unprobed(worlds):
    first, second = worlds[2].found("unmet")
    for found in (first, second):
        assert found.result == (False, [], None) and len(found.lines) == 1
        assert "within 1 s of the others. Call attach on every process" in found.lines[0]
    assert "processes [1] of 2" in first.lines[0] and 1 <= first.seconds < 3
    assert "some processes" in second.lines[0] and second.seconds < 1
    assert not list((worlds[2].out / "unmet").iterdir())


def test_a_process_that_is_too_slow_is_left_behind(worlds):
    for rank, found in enumerate(worlds[2].found("slow")):
        assert found.result == ([0], False) and len(found.lines) == 1
        assert "probing ended at step 1" in found.lines[0]
        cause = "another process left" if rank else "did not answer within 1.5 s"
        assert cause in found.lines[0]
        assert found.seconds < 8
        if rank == 0:
            assert 1.5 <= found.seconds < 4


def test_a_process_that_dies_is_left_behind(worlds):
    first, second = worlds[2].found("dies")
    assert second is None and worlds[2].context.processes[1].exitcode == 7
    assert first.result == ([0], False) and len(first.lines) == 1 and first.seconds < 4
    assert "probing ended at step 1" in first.lines[0] and "process left" in first.lines[0]
    assert worlds[2].context.processes[0].exitcode == 0


def run_example(rank, port, out):
    """The example as torchrun runs it on each process, whose lines go into a file."""
    os.environ.update(torchrun_environment(rank, 2, port))
    torch.set_num_threads(1)
    sys.argv = ["two_processes.py", "--epochs", "1"]
    with open(out / f"{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / "two_processes.py"), run_name="__main__")


def check_example(printed):
    assert "2 processes, 16 samples each; the report: 32" in printed
    last = printed.split("tr F of each process: ")[1]
    first, second = json.loads(last.splitlines()[0])
    assert first == second > 0
    assert printed.count("step 50 · 32 inputs") == 1


def test_the_example_counts_both_processes_samples(tmp_path):
    """Their exit status is not asked for: gloo may abort at exit, fimprobe or not."""
    for process in start_processes(run_example, (free_port(), tmp_path), 2).processes:
        process.join(60)
        assert process.exitcode is not None
    check_example("".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2)))


@pytest.mark.long
def test_the_example_by_torchrun():
    example, launcher = EXAMPLES / "two_processes.py", [sys.executable, "-m", "torch.distributed.run"]
    command = [*launcher, "--standalone", "--nproc-per-node", "2", example, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "tr F of each process: " in done.stdout, done.stderr
    check_example(done.stdout)
