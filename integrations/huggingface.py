"""``FimProbeCallback`` for the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fimprobe.torchvision_compat import hide_broken_torchvision

hide_broken_torchvision()  # before transformers imports torchvision

from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import (  # noqa: E402
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
)

from fimprobe import (  # noqa: E402
    Config,
    FimprobeError,
    Likelihood,
    Probe,
    Report,
    Sink,
    load_config,
)
from fimprobe.errors import ErrorHandler, guarded  # noqa: E402
from fimprobe.integrations.trainer_folders import (  # noqa: E402
    checkpoint_folder,
    choose_folder,
    note_folder,
)
from fimprobe.probe.notices import print_command  # noqa: E402

_HEADLINES = ("trace", "rel_error", "one_label_error")

_TRACKERS = {"wandb": WandbCallback, "mlflow": MLflowCallback}
"""The trackers of ``report_to`` that the probe writes to itself, and the Trainer's callbacks."""

_callbacks: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FimProbeCallback]] = (
    weakref.WeakKeyDictionary()
)
"""The callback that probes each model."""


class FimProbeCallback(TrainerCallback):
    """Measure during the training of a ``Trainer``; steps are ``state.global_step``.

    Reports go to the folder ``fimprobe`` in the TensorBoard run of the Trainer. Without such a run
    it is ``<output_dir>/runs/<time>_<host>/fimprobe``. Where ``report_to`` names W&B or MLflow, all
    numbers of the model go to the Trainer's run there. Headline values go to the log of the Trainer,
    and from there to every other tracker: the trace, ``rel_error`` (of the report) and
    ``one_label_error`` (of the estimator with one label per input) of Î₁ and Î₂, where they are
    known. ``fim_probe/overhead`` is the share of the wall time since the training began that the
    probe took so far; it begins after 30 seconds. A training that
    resumes from a checkpoint continues the files of the training that wrote it. A new training whose
    folder holds reports writes to ``fimprobe-2``.

    ``callback.probe`` holds the reports, also after training. A training that ends by an exception
    does not inform its callbacks, and its hooks keep the last batch. They are removed by the next
    training of the model, with the callback, or by :meth:`detach`.

    Args:
        config: YAML path, mapping or :class:`fimprobe.Config`; by default the file named by the
            environment variable ``FIMPROBE_CONFIG``.
        likelihood: As for :func:`fimprobe.attach`.
        log_dir: As for :func:`fimprobe.attach`.
        mask: As for :func:`fimprobe.attach`.
        labels: As for :func:`fimprobe.attach`.
        output: As for :func:`fimprobe.attach`.
        sinks: As for :func:`fimprobe.attach`.
        options: Fields of :class:`fimprobe.Config`, which take precedence over ``config``.

    Raises:
        FimprobeError: For a configuration with mistakes.

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
        if likelihood != "auto":
            options["likelihood"] = likelihood
        self.config = load_config(config, **options)
        if log_dir is not None:
            self.config = self.config.with_log_dir(log_dir)
        self.probe: Probe | None
        self.errors: ErrorHandler  # the probe's, once there is one
        self._attach_arguments: dict[str, Any] = {
            "mask": mask,
            "labels": labels,
            "output": output,
            "sinks": sinks,
        }
        self._attach_pending = False
        self._state: Callable[[], TrainerState | None] = lambda: None
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._detach_probe: Callable[[], Any] = lambda: None
        self._begin()

    def _begin(self) -> None:
        """Forget the probe of an earlier training, and its errors."""
        self.probe = None
        self.errors = ErrorHandler(raises=self.config.on_error == "raise")

    def detach(self) -> None:
        """Remove the hooks and close the files. Calling it again does nothing."""
        self._detach_probe()

    # -- events ------------------------------------------------------------------------------

    @guarded(defers=False)
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from an earlier training, which may have ended with an exception."""
        self.detach()
        self._begin()
        self._attach_pending = True

    @guarded(defers=False)
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach before the first step, when the folders of all callbacks are known."""
        if self._attach_pending:
            self._attach_pending = False
            failure = "nothing is probed, training continues"
            if not self.errors.run_safely(
                lambda: self._attach(args, state, kwargs["model"]), failure
            ):
                self.detach()

    @guarded(defers=False)
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the number of the step before its forward, which decides whether it is due."""
        probe = self.probe
        if probe is not None and not probe.detached:
            probe.steps = state.global_step

    @guarded(defers=False)
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure before the parameters change, and log the headline values."""
        probe = self.probe
        if probe is None or probe.detached:
            return
        probe.steps = state.global_step
        report = probe.step()
        if report is not None:
            values = _headlines(report)
            if probe.overhead is not None:
                values["fim_probe/overhead"] = probe.overhead
            failure = "the headline values could not be written to the Trainer's log"
            self.errors.run_safely(lambda: self._log(values, state, control), failure, key=failure)

    @guarded(defers=False)
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the folder of the reports into the checkpoint."""
        folder = checkpoint_folder(args, state)
        probe = self.probe
        if probe is None or probe.log_dir is None or not folder.is_dir():
            return
        failure = f"the folder of the reports could not be noted in {folder}"
        write = functools.partial(note_folder, folder, probe.log_dir)
        self.errors.run_safely(write, failure)

    @guarded(defers=False)
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks and close the files."""
        self.detach()

    # -- inside ------------------------------------------------------------------------------

    def _attach(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Attach to the model, or to the compiled object that the Trainer calls.

        Raises:
            FimprobeError: For DeepSpeed, and if another callback probes the same training.
        """
        trainer, checkpoint = _calling_trainer()
        called = model
        if trainer is not None:
            if trainer.is_deepspeed_enabled:
                raise FimprobeError(
                    "a model that DeepSpeed trains cannot be probed. Train with DDP or FSDP2, or "
                    "remove FimProbeCallback."
                )
            if hasattr(
                trainer.model_wrapped, "_orig_mod"
            ):  # a compiled graph leaves out hooks inside
                called = trainer.model_wrapped
            self._trainer = weakref.ref(trainer)
        other = _callbacks.get(model, lambda: None)()
        if other is not None and other.probe is not None and not other.probe.detached:
            if other._state() is state:
                raise FimprobeError(
                    "the Trainer has two FimProbeCallbacks; the first one probes. Remove this one."
                )
            other.detach()  # its training ended by an exception
        self._state = weakref.ref(state)
        config = self.config
        if config.tensorboard:
            wanted = config.tensorboard.log_dir
            folder = choose_folder(args, state, trainer, checkpoint, wanted)
            config = config.with_log_dir(folder)
        in_use = {n: True for n in _TRACKERS if n in (args.report_to or ())}
        config = load_config(
            config, **{n: on for n, on in in_use.items() if n not in self.config.model_fields_set}
        )
        probe = Probe(called, config, first_step=state.global_step, **self._attach_arguments)
        self.probe, self.errors = probe, probe.errors
        self._detach_probe = weakref.finalize(self, probe.detach)
        _callbacks[model] = weakref.ref(self)
        if probe.log_dir is not None:
            configured = self.config.tensorboard and self.config.tensorboard.log_dir
            run = probe.log_dir if configured else probe.log_dir.parent
            at = f" (continued at step {state.global_step})" if state.global_step else ""
            print_command(run, self.errors, at)

    def _log(self, values: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        trainer = self._trainer()
        if trainer is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            return
        should_log = control.should_log
        handler = trainer.callback_handler
        callbacks = handler.callbacks
        handler.callbacks = [c for c in callbacks if not isinstance(c, self._own_trackers())]
        try:
            # not trainer.log: trainers that override it add their metrics to an entry and reset them
            Trainer.log(trainer, values)
        finally:
            handler.callbacks = callbacks
        control.should_log = should_log  # on_log resets it

    def _own_trackers(self) -> tuple[type, ...]:
        """Return the callbacks of trackers that have all values from the probe already."""
        probe = self.probe
        assert probe is not None
        kinds = [kind for name, kind in _TRACKERS.items() if getattr(probe.config, name)]
        return (*kinds, *([TensorBoardCallback] if probe.log_dir is not None else []))


def _calling_trainer() -> tuple[Trainer | None, str | None]:
    """Return the Trainer of the present event, and the checkpoint from which it resumes.

    Events pass neither, so both are read from the frames of the callers.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        # a frame keeps the copy that f_locals makes, and with it the user's objects: check first
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(
            frame.f_locals.get("self"), Trainer
        ):
            checkpoint = frame.f_locals.get("resume_from_checkpoint")
            return frame.f_locals["self"], checkpoint if isinstance(checkpoint, str) else None
        frame = frame.f_back
    return None, None


def _headlines(report: Report) -> dict[str, float]:
    """Return the known headline values; all are finite, as JSON and charts need."""
    values = report.scalars(layers=())
    tags = [f"fim/{kind}/{name}" for kind in ("i1", "i2") for name in _HEADLINES]
    return {tag: values[tag] for tag in tags if tag in values}
