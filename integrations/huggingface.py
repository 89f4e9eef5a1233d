"""``FimProbeCallback``: the adapter to Hugging Face's ``Trainer``."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from fimprobe import Config, FimprobeError, Likelihood, Probe, Report, Sink, load_config

logger = logging.getLogger("fimprobe")

CHECKPOINT_NOTE = "fimprobe.json"
"""The file in a checkpoint that tells a resumed training where its reports are."""

_HEADLINES = ("trace", "rel_error", "one_label_error")

_callbacks: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FimProbeCallback]] = (
    weakref.WeakKeyDictionary()
)
"""The callback that probes a model."""


class FimProbeCallback(TrainerCallback):
    """Watch a ``Trainer``'s training; steps are ``state.global_step``.

    Reports go to ``<the Trainer's TensorBoard run>/fimprobe`` (without one to
    ``<output_dir>/runs/<time>_<host>/fimprobe``), headline values to the Trainer's own log: of Î₁
    and Î₂ the trace, ``rel_error`` (of the report) and ``one_label_error`` (of the estimator with
    one label for each input) where they are known, and ``fim_probe/overhead``, the share of the wall
    time that probing took so far. A training that resumes from a checkpoint continues the files of
    the one that wrote it; one that starts anew where reports are gets a folder ``fimprobe-2``.

    Args:
        config: YAML path, mapping or :class:`fimprobe.Config`; by default the file that the
            environment variable ``FIMPROBE_CONFIG`` names. ``options`` (its fields as keywords)
            win over it.
        likelihood, log_dir, mask, labels, output, sinks: as for :func:`fimprobe.attach`.

    ``callback.probe`` holds the reports, after training too. An exception ends a training without
    telling its callbacks: the hooks, which then only hold the last batch, go with the next training
    of the model, with the callback, or by :meth:`detach`.

    Raises:
        FimprobeError: for a configuration with mistakes.

    >>> FimProbeCallback(schedule={"every": 50}, draws=4).config.draws
    4
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | Config | None = None,
        *,
        likelihood: str | Likelihood = "auto",
        log_dir: str | Path | None = None,
        mask: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
        labels: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        sinks: list[Sink] | None = None,
        **options: Any,
    ) -> None:
        if config is None:
            config = os.environ.get("FIMPROBE_CONFIG") or None
        if log_dir is not None:
            options["tensorboard"] = {"log_dir": str(log_dir)}
        if likelihood != "auto":
            options["likelihood"] = likelihood
        self.config = load_config(config, **options)
        self.probe: Probe | None = None
        self._given: dict[str, Any] = {
            "mask": mask,
            "labels": labels,
            "output": output,
            "sinks": sinks,
        }
        self._waiting = False
        self._state: Callable[[], TrainerState | None] = lambda: None
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._finish: Callable[[], Any] = lambda: None
        self._began = self._spent = 0.0
        self._told: set[str] = set()

    def detach(self) -> None:
        """Take the hooks off, close the files. Calling it again does nothing."""
        self._finish()

    # -- events ------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a training that ended by an exception."""
        self.detach()
        self.probe = None
        self._waiting = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, before the first step: by now all callbacks know where they write."""
        if self._waiting:
            self._waiting = False
            what = "nothing is probed, training goes on"
            self._guarded(lambda: self._attach(args, state, kwargs["model"]), what)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the step's number before its forward: by it the probe knows whether to look."""
        probe = self.probe
        if probe is not None and not probe.detached:
            probe.steps = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, before the parameters change."""
        probe = self.probe
        if probe is None or probe.detached:
            return
        started = time.perf_counter()
        probe.steps = state.global_step
        report = probe.step()
        ended = time.perf_counter()
        self._spent += ended - started
        if report is not None:
            values = _headlines(report)
            values["fim_probe/overhead"] = self._spent / (ended - self._began)
            what = "the Trainer's log did not take the probe's values"
            self._guarded(lambda: self._log(values, state, control), what)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note in the checkpoint where the reports are."""
        folder = _checkpoint(args, state)
        probe = self.probe
        if probe is None or probe.log_dir is None or not folder.is_dir():
            return
        note = json.dumps({"log_dir": os.path.relpath(probe.log_dir, folder)})
        what = f"{folder} holds no note of where the reports are"
        self._guarded(lambda: (folder / CHECKPOINT_NOTE).write_text(note + "\n"), what)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self.detach()

    # -- inside ------------------------------------------------------------------------------

    def _attach(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        trainer, checkpoint = _calling_trainer()
        called = model
        if trainer is not None:
            if trainer.is_deepspeed_enabled:
                raise FimprobeError(
                    "a model that DeepSpeed trains cannot be probed; train with DDP or FSDP2, or "
                    "leave FimProbeCallback out"
                )
            if hasattr(trainer.model_wrapped, "_orig_mod"):  # compiled: hooks inside would not run
                called = trainer.model_wrapped
            self._trainer = weakref.ref(trainer)
        other = _callbacks.get(model, lambda: None)()
        if other is not None and other.probe is not None and not other.probe.detached:
            if other._state() is state:
                raise FimprobeError(
                    "the Trainer has two FimProbeCallbacks; the first one probes, leave this one out"
                )
            other.detach()  # its training ended by an exception
        self._state = weakref.ref(state)
        config = self.config
        if config.tensorboard:
            folder = self._folder(args, state, trainer, checkpoint)
            config = load_config(config, tensorboard={"log_dir": str(folder)})
        probe = Probe(called, config, first_step=state.global_step, **self._given)
        self.probe = probe
        self._finish = weakref.finalize(self, probe.detach)
        _callbacks[model] = weakref.ref(self)
        self._began, self._spent = time.perf_counter(), 0.0
        if probe.log_dir is not None:
            own = self.config.tensorboard and self.config.tensorboard.log_dir
            run = probe.log_dir if own else probe.log_dir.parent
            at = f" (continued at step {state.global_step})" if state.global_step else ""
            print(f"fimprobe: tensorboard --logdir {run}{at}")

    def _folder(
        self,
        args: TrainingArguments,
        state: TrainerState,
        trainer: Trainer | None,
        checkpoint: str | None,
    ) -> Path:
        """Where this training writes; never to a folder with reports of another."""
        given = self.config.tensorboard and self.config.tensorboard.log_dir
        resumed = state.global_step > 0
        if given:
            folder = Path(given)
        else:
            before = Path(checkpoint) if checkpoint else _checkpoint(args, state)
            noted = _read_note(before) if resumed else None
            folder = noted or _run(args, trainer) / "fimprobe"
        if resumed:
            return folder
        free, number = folder, 1
        while any(free.glob("*tfevents*")):
            number += 1
            free = folder.with_name(f"{folder.name}-{number}")
        return free

    def _log(self, values: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        trainer = self._trainer()
        if trainer is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            return
        wanted = control.should_log
        # not trainer.log: trainers that override it empty their own metrics into each entry
        Trainer.log(trainer, values)
        control.should_log = wanted  # on_log resets it

    def _guarded(self, action: Callable[[], Any], what: str) -> None:
        """An exception in a callback would end the training."""
        try:
            action()
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            if what not in self._told:
                self._told.add(what)
                kind = "" if isinstance(error, FimprobeError) else f"{type(error).__name__}: "
                logger.warning("fimprobe: %s: %s%s", what, kind, error)


def _calling_trainer() -> tuple[Trainer | None, str | None]:
    """The Trainer whose event this is, and the checkpoint it resumes from: events pass neither."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        # f_locals is a copy that a frame keeps: not of every frame, it would hold the user's objects
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(
            frame.f_locals.get("self"), Trainer
        ):
            checkpoint = frame.f_locals.get("resume_from_checkpoint")
            return frame.f_locals["self"], checkpoint if isinstance(checkpoint, str) else None
        frame = frame.f_back
    return None, None


def _run(args: TrainingArguments, trainer: Trainer | None) -> Path:
    """The Trainer's TensorBoard run, or where it would be."""
    for callback in trainer.callback_handler.callbacks if trainer is not None else ():
        if isinstance(callback, TensorBoardCallback):
            writer = callback.tb_writer  # torch's has a log_dir, tensorboardX's a logdir
            found = getattr(writer, "log_dir", None) or getattr(writer, "logdir", None)
            found = found or callback.logging_dir
            if found:
                return Path(found)
    assert args.output_dir is not None
    default = Path(args.output_dir, "runs", f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}")
    return Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or default).expanduser()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read_note(checkpoint: Path) -> Path | None:
    """The folder of the training that wrote a checkpoint, where there is one still."""
    try:
        folder = (
            checkpoint / json.loads((checkpoint / CHECKPOINT_NOTE).read_text())["log_dir"]
        ).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None


def _headlines(report: Report) -> dict[str, float]:
    """What is known of them, finite: they are saved as JSON and plotted."""
    values = report.scalars(layers=())
    tags = [f"fim/{kind}/{name}" for kind in ("i1", "i2") for name in _HEADLINES]
    return {tag: values[tag] for tag in tags if tag in values}
