"""Two processes that measure together, one of which fails, ends, hangs or is stopped at some stage."""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fimprobe.distributed import processes
from tests.faults.outcome import Outcome
from tests.faults.training import Training, differences, messages, mlp, traced
from tests.support.processes import free_port

WAIT_SECONDS = 2.0
"""Time that processes wait for each other here; 60 s in ``attach`` and 300 s else by default."""

LONGEST_SECONDS = 4 * WAIT_SECONDS + 10
"""Time after which a training hangs: one wait in ``attach``, one in a measurement, and the rest."""

NOT_REACHED = "the stage is not reached"

MAX_TRIES = 3
"""Where one process is so slow that the other one waits in vain before, nothing was injected."""

STAGES = (
    "join_processes",
    "GlooProcessGroup.__init__",
    "BatchCapture._before",
    "BatchCapture._observe_gradient",
    "StepListener.before_step",
    "StepMeasurement.measure",
    "select_samples",
    "ProcessShare.check",
    "ProcessShare.compare",
    "ProcessShare.measure",
    "bound_layer_jacobians",
    "_add",
    "merge",
    "build_report",
    "SinkGroup.write",
    "Probe.detach",
)
"""The functions at whose first call one process fails, in their order."""


def _raise(error: BaseException) -> None:
    raise error


FAULTS: dict[str, Callable[[], Any]] = {
    "raises": lambda: _raise(RuntimeError("injected")),
    "has no memory": lambda: _raise(MemoryError("injected")),
    "is interrupted": lambda: _raise(KeyboardInterrupt()),
    "exits": lambda: os._exit(3),
    "hangs": lambda: time.sleep(3600),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


@dataclass(kw_only=True)
class Case:
    """What happens to one of two processes."""

    fault: str
    stage: str
    victim: int

    @property
    def averages(self) -> bool:
        """Whether the processes add their gradients up, and so wait for each other in every step."""
        return self.fault in {"raises", "has no memory"}

    @property
    def ends(self) -> bool:
        """Whether the process does not train on."""
        return self.fault in {"exits", "hangs"}


def cases(
    faults: Iterable[str] = FAULTS, stages: Iterable[str] = STAGES, victims: Iterable[int] = (0, 1)
) -> Iterator[Case]:
    """All combinations."""
    for fault in faults:
        for stage in stages:
            for victim in victims:
                yield Case(fault=fault, stage=stage, victim=victim)


def two_processes(chosen: Iterable[Case]) -> list[Outcome]:
    """Train in two processes; what one suffers ends neither the other's training nor hangs it."""
    expected = {averages: _train_plain(averages) for averages in (False, True)}
    outcomes: dict[str, Outcome] = {}
    slowest: dict[str, float] = {}
    for case in chosen:
        outcome = outcomes.setdefault(case.fault, Outcome(f"of two processes one {case.fault}"))
        for _ in range(MAX_TRIES):
            faults, told, seconds = _run(case, expected[case.averages])
            if NOT_REACHED not in faults:
                break
        outcome.count(f"process {case.victim}, {case.stage}", faults, told=told)
        slowest[case.fault] = max(slowest.get(case.fault, 0.0), seconds)
        outcome.note = f"{slowest[case.fault]:.1f} s at most, of which {WAIT_SECONDS:g} s a wait"
    return list(outcomes.values())


def _run(case: Case, expected: dict[str, Any]) -> tuple[list[str], bool, float]:
    """What went wrong, whether each process that trains on was told once, and the seconds."""
    folder, started = Path(tempfile.mkdtemp()), time.perf_counter()
    port, faults, told = free_port(), [], True
    children = [_fork(case, rank, port, folder) for rank in (0, 1)]
    other = 1 - case.victim
    ended = {other: _wait(children[other], started + LONGEST_SECONDS)}
    seconds = time.perf_counter() - started
    _await_fault(case, children[case.victim], folder)
    if case.fault == "is stopped":
        os.kill(children[case.victim], signal.SIGCONT)
    elif case.fault == "hangs":
        os.kill(children[case.victim], signal.SIGKILL)
    ended[case.victim] = _wait(children[case.victim], time.perf_counter() + LONGEST_SECONDS)
    for rank in (0, 1):
        if rank == case.victim and case.ends:
            continue
        found, lines = _faults_of(folder, rank, ended[rank], expected)
        faults += [f"process {rank}: {fault}" for fault in found]
        told = told and len(lines) <= 1
    started_both = (folder / "started0").exists() and (folder / "started1").exists()
    if not (started_both and (folder / "reached").exists()):
        faults.append(NOT_REACHED)
    shutil.rmtree(folder)
    return faults, told, seconds


def _faults_of(
    folder: Path, rank: int, status: int | None, expected: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """What went wrong in one process, and the lines that it logged."""
    output = (folder / f"output{rank}").read_text()
    if status is None:
        return [f"hangs: {output[-2000:]}"], []
    if status != 0:
        return [f"ended with {status}: {output[-300:]}"], []
    state, lines, steps = pickle.loads((folder / f"result{rank}").read_bytes())
    faults = differences(state, expected)
    if len(lines) > 1 or (not lines and steps != [0, 2]):
        faults.append(f"told {len(lines)} times with reports {steps}: {lines}")
    if "Traceback" in output or "terminate" in output:
        faults.append(f"printed {output[-300:]}")
    return faults, lines


def _fork(case: Case, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.dump_traceback_later(LONGEST_SECONDS - 3, file=descriptor)
        _train(case, rank, port, folder)
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def _train(case: Case, rank: int, port: int, folder: Path) -> None:
    """Train in one process; an interrupted one goes on, as in a notebook."""
    processes.JOIN_TIMEOUT_SECONDS = processes.MEASUREMENT_TIMEOUT_SECONDS = WAIT_SECONDS
    where, training = f"tcp://127.0.0.1:{port}", _start()
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    (folder / f"started{rank}").touch()

    def act() -> None:
        (folder / "reached").touch()
        FAULTS[case.fault]()

    def attempt(action: Callable[[], Any]) -> None:
        try:
            action()
        except KeyboardInterrupt:
            action()
        except RuntimeError as error:  # attaching is the user's call, which may fail
            if str(error) != "injected":
                raise

    with messages() as lines, _acting(case.stage if rank == case.victim else "", act):
        attempt(lambda: training.attach(folder / "a"))
        average = _add_gradients if case.averages else None
        attempt(lambda: training.train(before_step=average))
        if training.probe is not None:
            attempt(training.probe.detach)
            training.probe.detach()
    steps = [] if training.probe is None else [r.step for r in training.probe.history]
    result = training.state(), lines, steps
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))


def _start() -> Training:
    random.seed(0)  # Python seeds its stream anew in a fork
    return Training(mlp)


def _train_plain(averages: bool) -> dict[str, Any]:
    """The state after a training of one process, whose gradients are those of two equal ones."""
    training = _start()
    training.train(before_step=_double_gradients if averages else None)
    return training.state()


def _double_gradients(training: Training) -> None:
    for p in training.model.parameters():
        p.grad.mul_(2)


def _add_gradients(training: Training) -> None:
    for p in training.model.parameters():
        dist.all_reduce(p.grad)


@contextmanager
def _acting(name: str, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` at the first call of the package's function of a name, before its first line."""
    pending = bool(name)

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal pending
        if pending and frame.f_code.co_qualname == name:
            pending = False
            act()

    threading.settrace(trace)  # processes join in a thread of their own
    try:
        with traced(trace):
            yield
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def _await_fault(case: Case, child: int, folder: Path) -> None:
    """Wait until the process hangs or is stopped; on a busy machine the other one may end before."""
    deadline = time.perf_counter() + LONGEST_SECONDS
    state = Path(f"/proc/{child}/stat")
    while case.fault in {"hangs", "is stopped"} and time.perf_counter() < deadline:
        is_stopped = state.read_text().rpartition(")")[2].split()[0] in "TtZ"
        if (folder / "reached").exists() and (is_stopped or case.fault == "hangs"):
            return
        time.sleep(0.01)


def _wait(child: int, deadline: float) -> int | None:
    """The exit status of a process; None if it had to be killed."""
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
