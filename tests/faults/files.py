"""Writes that fail: each write of a training in turn, and folders that are not there."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fimprobe
from fimprobe.sinks import jsonl
from fimprobe.sinks.tensorboard import event_file
from tests.faults.outcome import Outcome
from tests.faults.training import (
    Training,
    differences,
    left_behind,
    messages,
    missing_reports,
    mlp,
    open_files,
    plain_state,
)


class _Failing:
    """A file whose n-th write fails, after a part of it was written."""

    def __init__(self, file: Any, counter: list[int], number: int, code: int) -> None:
        self._file, self._counter, self._number, self._code = file, counter, number, code

    def write(self, data: Any) -> Any:
        self._counter[0] += 1
        if self._counter[0] == self._number:
            self._file.write(data[: len(data) // 2])
            raise OSError(self._code, os.strerror(self._code))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def failing_writes(number: int, code: int) -> Iterator[list[int]]:
    """Let the ``number``-th write to a JSONL or event file fail with an error of the system."""
    counter = [0]
    open_path = Path.open

    def open_failing(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open_path(self, mode, *args, **kwargs)
        return _Failing(file, counter, number, code) if set(mode) & set("awx") else file

    open_plain = builtins.open

    def open_by_name(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open_plain(path, mode, *args, **kwargs)
        ours = "tfevents" in str(path) or "jsonl" in str(path)
        return _Failing(file, counter, number, code) if ours and mode[:1] in "aw" else file

    with (
        _replaced(Path, "open", open_failing),
        _replaced(builtins, "open", open_by_name),
        _replaced(io, "open", open_by_name),  # TensorBoard's
    ):
        yield counter


CODES = {"full disk": errno.ENOSPC, "read-only": errno.EROFS, "input or output": errno.EIO}


def failing_files(most: int = 1000) -> Outcome:
    """Let each write fail in turn, as on a full disk, a read-only one and a broken one."""
    outcome, expected = Outcome("write that fails"), plain_state(mlp)
    for name, code in CODES.items():
        number = 1
        while number <= most:
            made = _train_with(
                lambda: failing_writes(number, code),
                outcome,
                f"{name}, write {number}",
                expected,
                number,
            )
            if made < number:
                break
            number += 1
    return outcome


def _train_with(
    fault: Callable[[], Any],
    outcome: Outcome,
    name: str,
    expected: dict[str, Any],
    number: int = 0,
) -> int:
    """Count one training inside of a context, if it made ``number`` writes; return how many it made."""
    folder, faults = Path(tempfile.mkdtemp()), []
    num_files, num_threads = open_files(), threading.active_count()
    training = Training(mlp)
    with messages() as lines, fault() as counter:
        try:
            training.attach(folder / "a")
            training.train()
            training.probe.detach()
        except Exception as error:
            faults.append(f"{type(error).__name__} reached the training: {error}")
    if training.probe is not None:
        faults += differences(training.state(), expected)
        faults += missing_reports(training, folder / "a", lines)
        if len(training.probe.history) != 2:
            faults.append(f"{len(training.probe.history)} reports")
    faults += left_behind(num_files, num_threads)
    path = folder / "a" / "fimprobe.jsonl"
    if path.exists() and path.stat().st_size:
        try:
            fimprobe.read(path)
        except fimprobe.FimprobeError:
            pass  # its first line was torn
        except Exception as error:
            faults.append(f"the file cannot be read: {type(error).__name__}: {error}")
    made = counter[0] if isinstance(counter, list) else 0
    shutil.rmtree(folder, ignore_errors=True)
    if len({line.split(" failed")[0] for line in lines}) < len(lines):  # each sink tells once
        faults.append(f"told {len(lines)} times: {lines}")
    if made >= number:
        outcome.count(name, faults, told=bool(lines))
    return made


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def folders_that_fail() -> Outcome:
    """Folders that cannot be made, are a file, are removed during the training, or are slow."""
    outcome, expected = Outcome("folder that fails"), plain_state(mlp)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)
            return function(*args, **kwargs)

        return call

    cases = {
        "no permission to make it": lambda: _replaced(Path, "mkdir", refused),
        "no permission to open a file": lambda: _replaced(jsonl.JsonlSink, "__init__", refused),
        "no permission to open events": lambda: _replaced(event_file.EventFile, "__init__", refused),
    }
    for name, fault in cases.items():
        _train_with(fault, outcome, name, expected)
    write = jsonl.JsonlSink.write
    count = Outcome(outcome.kind, told_once=None)
    _train_with(lambda: _replaced(jsonl.JsonlSink, "write", slow(write)), count, "slow", expected)
    _train_with(_removing_folder, count, "removed during the training", expected)
    outcome.injected += count.injected
    outcome.survived += count.survived
    outcome.told_once = (outcome.told_once or 0) + count.injected  # nothing to tell
    outcome.problems += count.problems
    return outcome


@contextmanager
def _removing_folder() -> Iterator[None]:
    write = jsonl.JsonlSink.write

    def write_then_remove(self: Any, report: Any) -> None:
        write(self, report)
        shutil.rmtree(self.path.parent)

    with _replaced(jsonl.JsonlSink, "write", write_then_remove):
        yield
