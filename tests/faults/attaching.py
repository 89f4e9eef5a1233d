"""Errors in every function of ``attach``: it fails as a whole, or the training is probed."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.faults.outcome import Outcome
from tests.faults.training import (
    PACKAGE,
    Place,
    Training,
    differences,
    failing,
    left_behind,
    messages,
    mlp,
    open_files,
    recorded,
)

ERRORS: Sequence[type[BaseException]] = (RuntimeError, MemoryError, KeyboardInterrupt)


def errors_in_attach(errors: Sequence[type[BaseException]] = ERRORS) -> Outcome:
    """Let the first call of each function raise; nothing is left, and a second ``attach`` works."""
    outcome = Outcome("error in a function of attach")
    calls: dict[Place, int] = {}
    for _ in range(2):  # what is imported or cached is so at the second time
        calls.clear()
        folder, training = Path(tempfile.mkdtemp()), Training(mlp)
        with recorded(calls):
            training.attach(folder / "a")
        training.probe.detach()
        shutil.rmtree(folder)
    for error in errors:
        for place in sorted(calls):
            faults, told = _faults_of(place, error("injected"))
            name = f"{error.__name__} in {place[0].removeprefix(PACKAGE)}:{place[1]} {place[2]}"
            outcome.count(name, faults, told=told)
    return outcome


def _faults_of(place: Place, error: BaseException) -> tuple[list[str], bool]:
    """What went wrong, and whether the user learned of the error once."""
    folder, faults = Path(tempfile.mkdtemp()), []
    num_files, num_threads = open_files(), threading.active_count()
    training, plain = Training(mlp), Training(mlp)
    with messages() as lines:
        try:
            with failing(place, error):
                training.attach(folder / "a")
        except BaseException as raised:
            if raised is not error and raised.__cause__ is not error:
                faults.append(f"{type(raised).__name__} in its place: {raised}")
            faults += left_behind(num_files, num_threads)
            faults += differences(training.state(), plain.state())
            told = not lines
            training.attach(folder / "a")
        else:
            told = len(lines) == 1
        training.probe.detach()
        if len(lines) > 1:
            faults.append(f"told {len(lines)} times: {lines}")
    faults += left_behind(num_files, num_threads)
    faults += differences(training.state(), plain.state())
    shutil.rmtree(folder)
    return faults, told
