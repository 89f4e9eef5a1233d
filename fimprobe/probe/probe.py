"""The probe: the one object with state. It sees batches, decides when, measures and reports."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.distributed.processes import ProcessGroup, SingleProcess, join_processes
from fimprobe.errors import BatchError, ErrorHandler, FimprobeError, describe_error
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import unwrap
from fimprobe.probe.arguments import check_probe_arguments
from fimprobe.probe.run_files import open_run_files
from fimprobe.probe.step_counter import StepCounter
from fimprobe.probe.step_measurement import StepMeasurement
from fimprobe.report.report import Report
from fimprobe.report.run_info import collect_run_info
from fimprobe.sinks.base import Sink
from fimprobe.sinks.sink_group import SinkGroup
from fimprobe.training.batch_reader import BatchReader, Mask
from fimprobe.training.capture import BatchCapture, Watched
from fimprobe.training.captured_batch import CapturedBatch
from fimprobe.training.schedule import Budget, SharedBudget

STEPS_WITHOUT_BATCH = 3
"""Optimizer steps without any captured batch after which the probe warns."""

_probed_models: set[int] = set()


class Probe:
    """Watches the training of one model; :func:`fimprobe.attach` makes it.

    :meth:`step` is called once for each optimizer step, before the parameters change. No error of the
    probe reaches the training loop, unless ``on_error="raise"``: it is logged once by the logger
    ``fimprobe``. A batch that cannot be measured is skipped; any other error ends probing.

    Args:
        model: The object that the loop calls.
        config: The options; default ones if None.
        mask: From the forward's (args, kwargs) to a boolean tensor of the labels' shape.
        labels: From the forward's (args, kwargs) to the labels of the data [B, ...].
        output: From what the model returns to its outputs [B, ...].
        sinks: Further objects with ``write(report)`` and ``close()``.
        first_step: Number of the step at which a training resumes; records of it and of later steps
            in the run's files are dropped.

    Raises:
        FimprobeError: For wrong arguments, and for a model that has a probe already.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config | None = None,
        *,
        mask: Mask | None = None,
        labels: Mask | None = None,
        output: Callable[[Any], Tensor] | None = None,
        sinks: list[Sink] | None = None,
        first_step: int = 0,
    ) -> None:
        started = time.perf_counter()
        self.model = model
        self.config = config or Config()
        functions = {"mask": mask, "labels": labels, "output": output}
        check_probe_arguments(model, self.config, functions)
        self._key = id(unwrap(model))
        if self._key in _probed_models:
            raise FimprobeError(
                "`model` must have no other probe, but it already has a probe. Call detach() on the "
                "first one before you attach another."
            )
        self.coverage: dict[str, str] = {}
        self.active = True
        self.detached = False
        self.schedule = self.config.schedule.build()
        if isinstance(self.schedule, Budget):
            self.schedule.staged = self.config.bounds or "i2" in self.config.estimators
        self._errors = ErrorHandler(raises=self.config.on_error == "raise")
        self._counter = StepCounter(first_step)
        self._loop_numbers_steps = True  # until the first step shows whether it does
        self._num_batches = self._num_steps_without_batch = 0
        self._reader = BatchReader(
            model,
            mask=mask,
            labels=labels,
            output=output or select_outputs,
            warn=self._errors.warn_once,
        )
        self._sinks = SinkGroup(sinks, self._errors)
        self._closers: list[Callable[[], None]] = []
        self.processes: ProcessGroup = SingleProcess()
        self._join_processes()
        self._measurement = StepMeasurement(
            model=model,
            config=self.config,
            reader=self._reader,
            processes=self.processes,
            errors=self._errors,
        )
        self.log_dir = None
        if self.active and self.processes.rank == 0:  # others keep reports in `history` only
            self.log_dir = open_run_files(
                self._sinks,
                self.config,
                schedule=self.schedule,
                describe_run=self._describe_run,
                first_step=first_step,
            )
        self._reader.set_likelihood(self.config.likelihood)
        self._capture = BatchCapture(model, self._may_be_measured, self._watch)
        _probed_models.add(self._key)
        self._last_end = time.perf_counter()
        # charged to the schedule with the first measurement
        self._attach_seconds = self._last_end - started

    # -- what users read ---------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far.

        Reading it waits for the device if GradScaler leaves to the device whether a step is made
        (fused optimizers).
        """
        return self._counter.read()

    @steps.setter
    def steps(self, number: int) -> None:
        self._counter.set(number)

    @property
    def due(self) -> bool:
        """Whether the next step is to be measured."""
        return self.active and self._counter.is_due(self.schedule)

    @property
    def likelihood(self) -> Likelihood | None:
        """The distribution of labels; None while ``"auto"`` is undecided."""
        return self._reader.likelihood

    @property
    def decision(self) -> str:
        """How the likelihood was decided."""
        return self._reader.decision

    @property
    def history(self) -> list[Report]:
        """The last 1,000 reports, oldest first."""
        return list(self._sinks.memory.reports)

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self._sinks.memory.reports[-1] if self._sinks.memory.reports else None

    def __enter__(self) -> Probe:
        """Use as ``with fimprobe.attach(model) as probe:``."""
        return self

    def __exit__(self, *error: object) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Remove every hook and close the files. Calling it again does nothing."""
        if self.detached:
            return
        self.detached, self.active = True, False
        _probed_models.discard(self._key)
        for close in self._closers:
            close()
        self._capture.remove()
        self._sinks.close()

    def on_detach(self, close: Callable[[], None]) -> None:
        """Have ``detach`` call ``close``, for adapters that set hooks themselves."""
        self._closers.append(close)

    # -- what adapters call ------------------------------------------------------------------

    def step(
        self, inputs: Any = None, *, number: int | None = None, found_inf: Tensor | None = None
    ) -> Report | None:
        """Count one optimizer step; measure if the schedule says so, before parameters change.

        Args:
            inputs: Measured in place of the captured batch, whatever the schedule says. Of several
                processes, all must pass theirs at the same step.
            number: Number of this step, if the loop has its own count; the next step follows it.
            found_inf: Not zero if the optimizer will skip this step, as GradScaler informs a fused
                optimizer. It is read only if the step is due.

        Returns:
            The report, or None if nothing was measured.
        """
        if self.detached:
            return None
        if number is not None:
            self.steps = number
        self._loop_numbers_steps = number is not None
        if found_inf is not None and (self._likelihood_unknown or self.due):
            if bool(torch.as_tensor(found_inf).any()):
                return None  # its batch may be that of another optimizer, which makes its step
            found_inf = None
        seen, captured = self._capture.pop()
        capture_error, self._capture.failed = self._capture.failed, None
        missing = not seen and inputs is None and capture_error is None
        if found_inf is not None or self._counter.has_unread_skips:
            self._counter.record_skip(found_inf, same=missing and self.processes.size == 1)
        if missing:
            self._count_missing_batch()
            if self.processes.size == 1:  # several processes must count alike
                return None
        self._num_batches += seen or inputs is not None
        started = time.perf_counter()
        due = inputs is not None or self.due
        step = self._counter.upper_bound
        self._counter.upper_bound += 1
        self._measurement.deferred_error = self._measurement.deferred_error or capture_error
        report = self._infer_and_measure(step, captured, inputs, due=due)
        self._observe_time(started, measured=report is not None)
        return report

    @property
    def backward_done(self) -> bool:
        """Whether the captured batch has its parameter gradients already."""
        return self._capture.backward_done

    def discard_batch(self, error: BatchError | None = None) -> None:
        """Forget the captured batch, for adapters that know it is not to be measured.

        Args:
            error: Reported by the next ``step``, in place of a measurement.
        """
        self._capture.discard()
        self._capture.failed = error or self._capture.failed

    # -- inside ------------------------------------------------------------------------------

    def _infer_and_measure(
        self, step: int, captured: CapturedBatch | None, inputs: Any, *, due: bool
    ) -> Report | None:
        """Infer the likelihood while it is unknown, and measure if due; errors are logged."""
        try:
            if self._likelihood_unknown:
                self._measurement.infer_likelihood(captured, inputs)
            if self.active and (due or self._measurement.must_fail):
                report = self._measurement.measure(step, captured, inputs, schedule=self.schedule)
                if report is not None:
                    self.coverage = report.coverage
                    self._sinks.write(report)
                return report
        except BatchError as error:
            if self._errors.raises:
                raise
            # messages that differ in numbers only are one
            key = re.sub(r"\d+", "", str(error))
            self._errors.warn_once(f"step {step} was not probed: {error}", key)
        except Exception as error:
            if self._errors.raises:
                raise
            self.active = False
            self._errors.warn_once(
                f"probing ended at step {step}, training continues: {describe_error(error)}"
            )
        return None

    def _observe_time(self, started: float, *, measured: bool) -> None:
        """Report the times of this step's loop and of its probe to the schedule."""
        ended = time.perf_counter()
        probe_seconds = 0.0
        if measured or not self.active:
            probe_seconds, self._attach_seconds = ended - started + self._attach_seconds, 0.0
        loop_seconds = max(started - self._last_end, 0.0)
        self.schedule.observe(loop_seconds=loop_seconds, probe_seconds=probe_seconds)
        self._last_end = ended

    def _join_processes(self) -> None:
        """Form the group of this training's processes."""
        try:
            self.processes = join_processes()
        except Exception as error:
            if self._errors.raises:
                raise
            self.active = False
            self._errors.warn_once(f"nothing is probed, training continues: {describe_error(error)}")
        if self.processes.size > 1 and isinstance(self.schedule, Budget):
            self.schedule = SharedBudget(self.schedule)

    @property
    def _likelihood_unknown(self) -> bool:
        return self.active and self._reader.likelihood is None

    def _may_be_measured(self) -> bool:
        """Return whether the batch that goes forward now may be measured at its step.

        A schedule's answer holds until the step is observed, however many forwards precede it; only
        a loop that numbers its steps itself may come to another one.
        """
        return self.active and (self._loop_numbers_steps or self._likelihood_unknown or self.due)

    def _watch(self, captured: CapturedBatch, returned: Any) -> Watched | None:
        """Return the output whose gradient is needed, and what stores it; None for none.

        The gradient shows the likelihood, the labels of the data and the ignored positions.
        """
        unknown, due = self._likelihood_unknown, self.due
        needs_gradient = unknown or (due and "empirical" in self.config.estimators)
        if not needs_gradient and not (due and self.config.likelihood == "auto"):
            return None
        try:
            outputs = self._reader.output(returned)
        except Exception:  # the measurement reports it
            return None
        if not isinstance(outputs, Tensor):
            return None
        if needs_gradient:
            captured.outputs = outputs.detach()
            return outputs, CapturedBatch.store_gradient
        return (outputs, self._reader.store_label_positions) if outputs.dim() > 2 else None

    def _count_missing_batch(self) -> None:
        """Count a step without a batch; warn at the third if there never was one."""
        self._num_steps_without_batch += 1
        is_third = self._num_steps_without_batch == STEPS_WITHOUT_BATCH
        if is_third and not self._num_batches and self.active:
            cause = (
                "its forward passes ran in eval mode; call model.train() while training"
                if self._capture.evaluations
                else "no forward pass of the attached object was seen; attach to the object that "
                "the loop calls, after torch.compile and other wrappers"
            )
            self._errors.warn_once(
                f"the optimizer steps, but no training batch was captured: {cause}, or call "
                "probe.step(inputs) yourself"
            )

    def _describe_run(self) -> dict[str, Any]:
        return collect_run_info(
            self.model,
            self.config,
            likelihood=self.likelihood,
            decision=self.decision,
            processes=self.processes.size,
        )
