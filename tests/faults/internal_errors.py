"""Errors in every function that a training with a probe calls, in turn."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.faults.outcome import Outcome
from tests.faults.training import (
    PACKAGE,
    STEPS,
    Place,
    Training,
    batch,
    differences,
    failing,
    left_behind,
    messages,
    missing_reports,
    open_files,
    plain_state,
    recorded,
)

ERRORS: Sequence[type[BaseException]] = (RuntimeError, MemoryError, torch.OutOfMemoryError)

ENTRIES = {
    "guarded.<locals>.decorate.<locals>.call_guarded",
    "_outside_of_graphs.<locals>.before_step",
    "BatchCapture._gradient_hook.<locals>.observe",
    "_Hook.__call__",
    "_HookTable.values",
    "_before_any_step",
    "_ObservedClosure.__call__",
}
"""The frames in which the training itself calls the probe: no guard is outside of them."""


def places_of(make_model: Callable[[], nn.Module]) -> dict[Place, int]:
    """The functions that are called between ``attach`` and the end of ``detach``, and how often."""
    calls: dict[Place, int] = {}
    folder = Path(tempfile.mkdtemp())
    for _ in range(2):  # what is imported or cached is so at the second time
        calls.clear()
        training = Training(make_model)
        training.attach(folder / "a")
        with recorded(calls):
            training.train()
            training.probe.detach()
        shutil.rmtree(folder)
    return {
        place: count
        for place, count in calls.items()
        if place[2] not in ENTRIES and place[2] != "<module>"
    }


def _evenly_spaced(places: dict[Place, int], share: float) -> list[Place]:
    return sorted(places)[:: max(1, round(1 / share))]


def errors_in_functions(
    make_model: Callable[[], nn.Module],
    errors: Sequence[type[BaseException]] = ERRORS,
    *,
    share: float = 1.0,
    last: bool = False,
) -> list[Outcome]:
    """Let the first (or last) call of each function raise.

    Args:
        make_model: Makes the network that is trained.
        errors: The types of the errors.
        share: Share of the functions, evenly spaced over the files.
        last: Whether the last call raises.
    """
    places = places_of(make_model)
    chosen = _evenly_spaced(places, share)
    expected = plain_state(make_model)
    outcomes = []
    for error in errors:
        when = "last" if last else "first"
        outcome = Outcome(f"{error.__name__} in the {when} call of a function, {make_model.__name__}")
        for place in chosen:
            call = places[place] if last else 1
            faults, told = _run(make_model, place, error, call, expected)
            name = f"{place[0].removeprefix(PACKAGE)}:{place[1]} {place[2]}"
            outcome.count(name, faults, told=told)
        outcomes.append(outcome)
    return outcomes


def _run(
    make_model: Callable[[], nn.Module],
    place: Place,
    error: type[BaseException],
    call: int,
    expected: dict[str, Any],
) -> tuple[list[str], bool]:
    """What went wrong, and whether the user was told once, or had nothing to be told."""
    folder = Path(tempfile.mkdtemp())
    num_files, num_threads = open_files(), threading.active_count()
    training, faults = Training(make_model), []
    with messages() as lines:
        training.attach(folder / "a")
        try:
            with failing(place, error("injected"), call):
                training.train()
                training.probe.detach()
        except BaseException as raised:
            faults.append(f"{type(raised).__name__} reached the training")
        training.probe.detach()
    faults += differences(training.state(), expected)
    faults += missing_reports(training, folder / "a", lines)
    # what fails once may be tried again at the next step
    complete = [r.step for r in training.probe.history][-1:] == [2]
    if len(lines) > 1 or (not lines and not complete):
        faults.append(f"told {len(lines)} times: {lines}")
    if any("Traceback" in line for line in lines):
        faults.append("a traceback was logged")
    faults += left_behind(num_files, num_threads)
    shutil.rmtree(folder)
    return faults, len(lines) == 1 or complete


def _state_after_repeating(make_model: Callable[[], nn.Module], step: int) -> dict[str, Any]:
    """The state after a plain training whose forward of one step was made twice."""
    training = Training(make_model)
    training.train(step)
    training.model(batch(step)[0])
    training.train()
    return training.state()


def interruptions(make_model: Callable[[], nn.Module], *, share: float = 1.0) -> Outcome:
    """Let KeyboardInterrupt come in each function: it passes, and the training can go on."""
    outcome = Outcome(f"KeyboardInterrupt in a function, {make_model.__name__}", told_once=None)
    places = places_of(make_model)
    expected = [
        plain_state(make_model),
        *map(partial(_state_after_repeating, make_model), range(STEPS)),
    ]
    for place in _evenly_spaced(places, share):
        folder = Path(tempfile.mkdtemp())
        num_files, num_threads = open_files(), threading.active_count()
        training, faults, passed = Training(make_model), [], False
        interrupted: Sequence[Any] = ()
        with messages() as lines:
            training.attach(folder / "a")
            try:
                with failing(place, KeyboardInterrupt()):
                    training.train()
                    training.probe.detach()
            except KeyboardInterrupt:
                passed = True
                interrupted = training.probe.history[-1:]  # it may not be in every file yet
            if not passed:
                faults.append("it did not pass")
            training.train()  # the step that was interrupted is made again
            training.probe.detach()
        if lines:
            faults.append(f"told {lines}")
        state = training.state()
        if state not in expected:
            faults += differences(state, expected[0])
        faults += missing_reports(training, folder / "a", lines, except_for=interrupted)
        faults += left_behind(num_files, num_threads)
        outcome.count(f"{place[0].removeprefix(PACKAGE)}:{place[1]} {place[2]}", faults)
        shutil.rmtree(folder)
    return outcome
