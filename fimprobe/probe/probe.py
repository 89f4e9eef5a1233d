"""The probe: the one object with state. It sees batches, decides when, measures and reports."""

from __future__ import annotations

import contextlib
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.distributed.processes import ProcessGroup, SingleProcess, join_processes
from fimprobe.errors import BatchError, ErrorHandler, describe_error, guarded
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.weak_model import WeakModel
from fimprobe.probe.arguments import (
    check_probe_arguments,
    criterion_of,
    warn_of_contradictions,
)
from fimprobe.probe.closing import (
    RunAccount,
    closing_paragraph,
    count_steps,
    why_nothing_was_due,
)
from fimprobe.probe.notices import announce
from fimprobe.probe.registry import make_room, model_key, register, unregister
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
from fimprobe.training.unseen_steps import (
    LATE_NOTE,
    NEVER_STEPPED,
    UNSEEN_STEPS,
    UNSEEN_WARNING,
    UnseenSteps,
)

STEPS_WITHOUT_BATCH = 3
"""Optimizer steps without any captured batch after which the probe warns."""


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
        loss: The criterion that implies the likelihood; None to infer it.
        sinks: Further objects with ``write(report)`` and ``close()``.
        first_step: Number of the step at which a training resumes; records of it and of later steps
            in the run's files are dropped.
        replace: Whether to detach a probe that the model has already; otherwise it is an error.

    Raises:
        FimprobeError: For wrong arguments, and for a model that has a probe already.
    """

    model = WeakModel()

    def __init__(
        self,
        model: nn.Module,
        config: Config | None = None,
        *,
        mask: Mask | None = None,
        labels: Mask | None = None,
        output: Callable[[Any], Tensor] | None = None,
        loss: nn.Module | None = None,
        sinks: list[Sink] | None = None,
        first_step: int = 0,
        replace: bool = False,
    ) -> None:
        self._account = RunAccount(first_step=first_step)
        self.model = model
        self.config = config or Config()
        functions = {"mask": mask, "labels": labels, "output": output}
        check_probe_arguments(model, self.config, functions)
        criterion = criterion_of(loss, self.config)
        self._key = model_key(model)
        self.errors = ErrorHandler(raises=self.config.on_error == "raise")
        make_room(model, self.errors, replace=replace)
        warn_of_contradictions(self.config, self.errors)
        self.coverage: dict[str, str] = {}
        self.detached = False
        self._measuring = self._concluded = False
        self.schedule = self.config.schedule.build()
        if isinstance(self.schedule, Budget):
            self.schedule.staged = self.config.bounds or "i2" in self.config.estimators
        self._counter = StepCounter(first_step)
        self._loop_numbers_steps = True  # until the first step shows whether it does
        self._num_batches = self._num_steps_without_batch = 0
        self._unseen: UnseenSteps | None = None
        self._reader = BatchReader(
            model,
            mask=mask,
            labels=labels,
            output=output,
            criterion=criterion,
            warn=self.errors.warn_once,
        )
        self._sinks = SinkGroup(sinks, self.errors)
        self._closers: list[Callable[[], None]] = []
        self.processes: ProcessGroup = SingleProcess()
        self._join_processes()
        self._measurement = StepMeasurement(
            config=self.config,
            reader=self._reader,
            processes=self.processes,
            errors=self.errors,
        )
        self.log_dir: Path | None = None
        self._reader.set_likelihood(self.config.likelihood)
        self._capture = BatchCapture(model, self._may_be_measured, self._watch, self.errors)
        self._freed = weakref.finalize(model, self.detach)
        self._freed.atexit = False
        register(self._key, self)
        try:
            self._open_files(first_step)
        except BaseException:
            self.detach()
            raise
        self._last_end = time.perf_counter()

    def _open_files(self, first_step: int) -> None:
        """Open the files; processes other than the first keep reports in ``history`` only."""
        if self.active and self.processes.rank == 0:
            self.log_dir = open_run_files(
                self._sinks,
                self.config,
                schedule=self.schedule,
                describe_run=self._describe_run,
                first_step=first_step,
            )

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
    def active(self) -> bool:
        """Whether it measures; False once it is detached, and after an error that ended probing."""
        return not self.detached and not self.errors.ended

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
    def overhead(self) -> float | None:
        """The share of the wall time since ``attach`` that measurements and files took.

        None in the first 30 seconds, when it is that of a start.
        """
        return self._account.overhead

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

    @guarded(defers=False)
    def detach(self) -> None:
        """Remove every hook and close the files. Calling it again does nothing.

        A measurement that runs, in this thread or another one, is completed and written first.
        """
        if self.detached:
            return
        error = self.errors.take_deferred()
        if error is not None:
            self.errors.end(f"an error after the last step: {describe_error(error)}")
        self.detached = True
        model_exists = self._freed.detach() is not None
        unregister(self._key, self)
        closers = [] if self._measuring else [self._sinks.close, self._conclude]
        closers += [*self._closers, *([self._capture.remove] if model_exists else [])]
        with contextlib.ExitStack() as stack:  # each is called, whatever the others raise
            for close in closers:
                stack.callback(close)
                stack.callback(close)  # does nothing, unless the first call failed

    def on_detach(self, close: Callable[[], None]) -> None:
        """Have ``detach`` call ``close``, for adapters that set hooks themselves."""
        self._closers.append(close)

    # -- what adapters call ------------------------------------------------------------------

    @guarded(defers=False)
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
        self._unseen = None  # the loop has steps
        return self._step(inputs, number, found_inf)

    def notice_unseen_steps(self) -> None:
        """Count changes of the parameters as steps where no step is ever seen, for ``attach``."""
        if self.processes.size == 1:  # several processes must count alike
            self._unseen = UnseenSteps()

    def _step(
        self, inputs: Any = None, number: int | None = None, found_inf: Tensor | None = None
    ) -> Report | None:
        """Count one step, as :meth:`step` does."""
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
        capture_error = self.errors.take_deferred()
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

    @guarded()
    def discard_batch(self, error: BatchError | None = None) -> None:
        """Forget the captured batch, for adapters that know it is not to be measured.

        Args:
            error: Reported by the next ``step``, in place of a measurement.
        """
        self._capture.discard()
        self.errors.deferred = error or self.errors.deferred

    # -- inside ------------------------------------------------------------------------------

    def _infer_and_measure(
        self, step: int, captured: CapturedBatch | None, inputs: Any, *, due: bool
    ) -> Report | None:
        """Infer the likelihood while it is unknown, and measure if due; errors are logged."""
        started = time.perf_counter()
        try:
            if self._likelihood_unknown:
                self._measurement.infer_likelihood(captured, inputs)
            if self.active and (due or self._measurement.must_fail):
                return self._measure(step, captured, inputs)
        except BatchError as error:
            self._account.why_skipped = f"step {step} was not probed: {error}"
            self.schedule.fail(time.perf_counter() - started)
            if self.errors.raises:
                raise
            # messages that differ in numbers only are one
            key = re.sub(r"\d+", "", str(error))
            self.errors.warn_once(self._account.why_skipped, key)
        except Exception as error:
            if self.errors.raises:
                raise
            self.errors.end(
                f"probing ended at step {step}, training continues: {describe_error(error)}"
            )
        return None

    def _measure(self, step: int, captured: CapturedBatch | None, inputs: Any) -> Report | None:
        """Measure, and write the report; close the files if the probe was detached meanwhile."""
        self._measuring = True
        try:
            report = self._measurement.measure(
                self.model, step, captured, inputs, schedule=self.schedule
            )
            if report is not None:
                self.coverage = report.coverage
                self._account.num_reports += 1
                self._sinks.write(report)
            return report
        finally:
            self._measuring = False
            if self.detached:
                self._conclude()
                self._sinks.close()

    def _observe_time(self, started: float, *, measured: bool) -> None:
        """Report the times of this step's loop and of its probe to the schedule."""
        ended = time.perf_counter()
        probe_seconds = 0.0
        if measured or not self.active:
            probe_seconds = ended - started
        self._account.probe_seconds += probe_seconds
        loop_seconds = max(started - self._last_end, 0.0)
        self.schedule.observe(loop_seconds=loop_seconds, probe_seconds=probe_seconds)
        self._last_end = ended

    def _join_processes(self) -> None:
        """Form the group of this training's processes."""
        try:
            self.processes = join_processes()
        except Exception as error:
            if self.errors.raises:
                raise
            self.errors.end(f"nothing is probed, training continues: {describe_error(error)}")
        self.errors.together = self.processes.size > 1
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
        self._notice_unseen_step()
        return self.active and (self._loop_numbers_steps or self._likelihood_unknown or self.due)

    def _watch(self, captured: CapturedBatch, returned: Any) -> Watched:
        """Return the outputs whose gradients are needed, and what stores them.

        The gradients show the likelihood, the labels of the data and the ignored positions.
        """
        if self._unseen is not None:
            self._unseen.record(self.model)
        due = self.due
        if not due and not self._likelihood_unknown:
            return {}
        labels = due and "empirical" in self.config.estimators
        return self._reader.watch(captured, returned, labels=labels)

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
            self._account.why_skipped = (
                f"the optimizer steps, but no training batch was captured: {cause}, or call "
                "probe.step(inputs) yourself"
            )
            self.errors.warn_once(self._account.why_skipped)

    def _notice_unseen_step(self) -> None:
        """Measure the last batch if the parameters changed since, and no optimizer ever stepped."""
        unseen = self._unseen
        if unseen is None:
            return
        unseen.forwards += 1
        if self._capture.is_running or not unseen.observe_change(self.model):
            return
        if unseen.count == UNSEEN_STEPS:
            self.errors.warn_once(UNSEEN_WARNING)
            self._measurement.notes.append(LATE_NOTE)
            self._counter.set(self._counter.read() + UNSEEN_STEPS - 1)
        if unseen.count >= UNSEEN_STEPS:
            self._step()

    def _conclude(self) -> None:
        """State what was measured, or why nothing was; write why probing ended."""
        if self._concluded or self.processes.rank > 0:
            return
        self._concluded = True
        self.errors.run_safely(self._write_conclusion, "the closing paragraph could not be written")

    def _write_conclusion(self) -> None:
        steps, last, reason = self._counter.upper_bound, self.last, self.errors.end_reason
        if last is not None:
            announce(closing_paragraph(self._account, last, self.config, steps=steps, reason=reason))
        else:
            first_step = self._account.first_step
            # these are as requested, or were logged as a warning when they occurred
            reason = (
                reason
                or self._account.why_skipped
                or why_nothing_was_due(self.schedule, first_step, steps)
            )
            if reason:
                announce(f"no report in {count_steps(steps - first_step)}: {reason.rstrip('.')}.")
            else:
                reason = self._why_nothing()
                if reason:
                    self.errors.warn_once(reason)
        if reason:
            self._sinks.write_end(reason, steps)

    def _why_nothing(self) -> str:
        """Return why nothing was measured, where no warning stated it; "" if nothing happened."""
        if self._unseen is not None and self._unseen.forwards >= UNSEEN_STEPS:
            return NEVER_STEPPED.format(forwards=self._unseen.forwards)
        if self._reader.likelihood is None and self._num_batches and self._reader.undecided:
            return (
                f"nothing was measured: likelihood='auto' is not decided after {self._num_batches} "
                f"training batches, because {self._reader.undecided}"
            )
        return ""

    def _describe_run(self) -> dict[str, Any]:
        return collect_run_info(
            self.model,
            self.config,
            likelihood=self.likelihood,
            decision=self.decision,
            processes=self.processes.size,
        )
