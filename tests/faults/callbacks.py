"""Errors in every function of the callbacks for Trainers, under real Trainers."""

from __future__ import annotations

import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.faults.outcome import Outcome
from tests.faults.training import (
    PACKAGE,
    Place,
    batch,
    failing,
    left_behind,
    messages,
    mlp,
    open_files,
    recorded,
)

OPTIONS = {"schedule": {"every": 1}, "estimators": ["i1"], "bounds": False}

ERRORS: Sequence[type[Exception]] = (RuntimeError, MemoryError)

STEPS = 2

Fit = Callable[[Any, Path], nn.Module]
"""Trains with a callback (None for none) in a folder, and returns the model."""


def huggingface(errors: Sequence[type[Exception]] = ERRORS, *, share: float = 1.0) -> Outcome:
    """Errors in the callback for the Trainer of transformers."""
    from fimprobe.integrations.huggingface import FimProbeCallback
    from tests.support.huggingface import trainer_of

    def fit(callback: Any, folder: Path) -> nn.Module:
        save = {"save_strategy": "steps", "save_steps": STEPS, "save_only_model": True}
        options = {"max_steps": STEPS, "report_to": "none", "logging_strategy": "no", **save}
        trainer = trainer_of(folder, *([callback] if callback else []), **options)
        trainer.train()
        return trainer.model

    def make_callback() -> Any:
        return FimProbeCallback(**OPTIONS, tensorboard={"figures": False})

    outcome = Outcome("error in the callback for the Trainer of transformers")
    _count_errors(outcome, "huggingface.py", make_callback, fit, errors=errors, share=share)
    return outcome


def lightning(errors: Sequence[type[Exception]] = ERRORS, *, share: float = 1.0) -> Outcome:
    """Errors in the callback for the Trainer of Lightning."""
    from fimprobe.integrations.lightning import FimProbeCallback, _lightning

    class Module(_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, data: Any, number: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(data[0]), data[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logging.getLogger(_lightning.__name__).setLevel(logging.ERROR)

    def fit(callback: Any, folder: Path) -> nn.Module:
        module = Module()
        trainer = _lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, logger=False,
            callbacks=[callback] if callback else [],
        )  # fmt: skip
        batches = [batch(step) for step in range(STEPS)]
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        return module

    def make_callback() -> Any:
        log_dir = tempfile.mkdtemp()
        return FimProbeCallback(**OPTIONS, tensorboard={"figures": False}, log_dir=log_dir)

    outcome = Outcome("error in the callback for the Trainer of Lightning")
    _count_errors(outcome, "lightning.py", make_callback, fit, errors=errors, share=share)
    return outcome


def _count_errors(
    outcome: Outcome,
    file: str,
    make_callback: Callable[[], Any],
    fit: Fit,
    *,
    errors: Sequence[type[Exception]],
    share: float,
) -> None:
    """Let the first call of each function of a callback's file raise.

    Args:
        outcome: Counts what becomes of it.
        file: Name of the callback's file.
        make_callback: Makes the callback.
        fit: Trains.
        errors: The types of the errors.
        share: Share of the functions, evenly spaced over the file.
    """
    expected = _fitted(fit, None)
    calls: dict[Place, int] = {}
    callback = make_callback()
    with recorded(calls):
        _fitted(fit, callback)
    places = sorted(p for p in calls if p[0].startswith(PACKAGE) and p[0].endswith(file))
    # a forward hook of Lightning's callback, outside of every guard: it appends to a list
    places = [p for p in places if "on_train_start.<locals>" not in p[2]]
    for place in places[:: max(1, round(1 / share))]:
        for error in errors:
            faults, told = _faults_of(fit, make_callback(), place, error("injected"), expected)
            outcome.count(f"{error.__name__} in {place[2]}", faults, told=told)


def _faults_of(
    fit: Fit, callback: Any, place: Place, error: Exception, expected: list[bytes]
) -> tuple[list[str], bool]:
    """What went wrong, and whether the user was told once, or had nothing to be told."""
    faults = []
    num_files, num_threads = open_files(), threading.active_count()
    with messages() as lines:
        try:
            with failing(place, error):
                if _fitted(fit, callback) != expected:
                    faults.append("differs")
        except BaseException as raised:
            faults.append(f"{type(raised).__name__} reached the training: {raised}")
    probe = callback.probe
    faults += left_behind(num_files, num_threads)
    complete = probe is not None and [r.step for r in probe.history] == list(range(STEPS))
    if len(lines) > 1 or (not lines and not complete):
        faults.append(f"told {len(lines)} times: {lines}")
    return faults, len(lines) == 1 or complete


def _fitted(fit: Fit, callback: Any) -> list[bytes]:
    """The parameters after a training."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = fit(callback, Path(folder))
        if callback is not None and callback.probe is not None:
            callback.probe.detach()  # what the callback itself may have failed in
    return [p.detach().numpy().tobytes() for p in model.parameters()]
