"""A small training with a probe and its files, and what must be the same as without the probe."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.sinks import folder_lock
from tests.support.bit_identity import streams

STEPS = 4

OPTIONS = {"schedule": {"at": [0, 2]}, "on_error": "warn"}

PACKAGE = str(Path(fimprobe.__file__).parent) + os.sep


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(2, 3),
    )  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)


class Messages(logging.Handler):
    """What the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def messages() -> Iterator[list[str]]:
    """The lines that are logged inside of the block."""
    handler, logger = Messages(), logging.getLogger("fimprobe")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class Training:
    """A training of a few steps.

    Args:
        make_model: Makes the network.
        figures: Whether the probe draws figures, which takes ten times as long as the rest.

    Attributes:
        probe: The probe; None where attaching failed.
        lines: What was logged.
    """

    def __init__(self, make_model: Callable[[], nn.Module], *, figures: bool = False) -> None:
        torch.manual_seed(0)
        self.figures = figures
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.step = 0
        self.probe: Any = None

    def attach(self, folder: Path, **options: Any) -> None:
        charts = {"log_dir": str(folder), "figures": self.figures}
        options = {**OPTIONS, "tensorboard": charts, **options}
        self.probe = fimprobe.attach(self.model, **options)

    def train(
        self, steps: int = STEPS, before_step: Callable[[Training], None] | None = None
    ) -> None:
        """Train up to ``steps``; begins where it was stopped.

        Args:
            steps: Number of the step after the last one.
            before_step: Called with the training between its backward and the optimizer's step.
        """
        while self.step < steps:
            x, y = batch(self.step)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            if before_step is not None:
                before_step(self)
            self.optimizer.step()
            self.step += 1

    def state(self) -> dict[str, bytes]:
        """All tensors as bytes, modes, hooks and random streams."""
        found: dict[str, Any] = {
            name: tensor.detach().numpy().tobytes()
            for name, tensor in self.model.state_dict(keep_vars=True).items()
        }
        for path, module in self.model.named_modules():
            attributes = module.__dict__
            found[f"{path} training"] = module.training
            found[f"{path} attributes"] = sorted(attributes)
            found[f"{path} hooks"] = [len(v) for k, v in attributes.items() if k.endswith("hooks")]
        found |= {f"stream {i}": x for i, x in enumerate(streams())}
        return found


def plain_state(make_model: Callable[[], nn.Module], steps: int = STEPS) -> dict[str, Any]:
    """The state after a training without a probe."""
    training = Training(make_model)
    training.train(steps)
    return training.state()


def differences(state: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    names = sorted(k for k in {*state, *expected} if state.get(k) != expected.get(k))
    return [f"differs: {', '.join(names)}"] if names else []


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def left_behind(num_files: int, num_threads: int) -> list[str]:
    """Files, locks and threads that a detached probe left, in words."""
    found = []
    if open_files() > num_files:
        found.append(f"{open_files() - num_files} files open")
    if threading.active_count() > num_threads:
        found.append(f"{threading.active_count() - num_threads} threads")
    if folder_lock._held_locks:
        found.append(f"locks held: {sorted(map(str, folder_lock._held_locks))}")
        for lock in list(folder_lock._held_locks.values()):
            lock.release()
    return found


def missing_reports(
    training: Training, folder: Path, lines: list[str], except_for: Sequence[Any] = ()
) -> list[str]:
    """Reports of the history that the files do not have and that no message names, in words."""
    named = ("Jsonl", "jsonl", "cannot be written")
    if not training.probe.history or any(name in line for name in named for line in lines):
        return []
    path = folder / "fimprobe.jsonl"
    try:
        written = {r["step"] for r in fimprobe.read(path)} if path.exists() else set()
    except Exception as error:
        return [f"the file cannot be read: {type(error).__name__}: {error}"]
    lost = {r.step for r in training.probe.history if r not in except_for} - written
    return [f"reports of steps {sorted(lost)} lost"] if lost else []


Place = tuple[str, int, str]
"""File, line and name of a function."""


def place_of(code: Any) -> Place:
    return code.co_filename, code.co_firstlineno, code.co_qualname


@contextmanager
def recorded(calls: dict[Place, int]) -> Iterator[None]:
    """Count the calls of the package's functions in this thread."""

    def trace(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            place = place_of(frame.f_code)
            calls[place] = calls.get(place, 0) + 1

    with traced(trace):
        yield


@contextmanager
def failing(place: Place, error: BaseException, call: int = 1) -> Iterator[None]:
    """Let the ``call``-th call of one function raise, before its first line."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if frame.f_code.co_firstlineno == place[1] and place_of(frame.f_code) == place:
            count += 1
            if count == call:
                raise error

    with traced(trace):
        yield


@contextmanager
def traced(trace: Callable[..., None]) -> Iterator[None]:
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def no_fault() -> Any:
    return nullcontext()
