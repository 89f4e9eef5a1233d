"""From one optimizer step to the next: the batch is captured, counted, and measured if it is due."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import BatchError, ErrorHandler, describe_error
from fimprobe.model.weak_model import WeakModel
from fimprobe.probe.run_account import RunAccount
from fimprobe.probe.step_counter import StepCounter
from fimprobe.probe.step_measurement import StepMeasurement
from fimprobe.report.report import Report
from fimprobe.sinks.sink_group import SinkGroup
from fimprobe.training.batch_reader import BatchReader
from fimprobe.training.capture.capture import BatchCapture, Watched
from fimprobe.training.capture.captured_batch import CapturedBatch
from fimprobe.training.schedule import Schedule
from fimprobe.training.unseen_steps import LATE_NOTE, UNSEEN_WARNING, UnseenSteps


class StepCycle:
    """The state of a probe between two optimizer steps.

    Args:
        model: The object that the loop calls.
        config: The options.
        schedule: Decides which steps are due.
        reader: Selects batches, and holds the likelihood.
        processes: The processes of the training.
        errors: Treats errors.
        account: Records reports, batches and seconds.
        sinks: Receive the reports.
        finish: Called after a measurement during which the probe was detached.

    Attributes:
        schedule: Decides which steps are due.
        counter: The number of steps.
        capture: The training batches since the last step.
        measurement: Measures a batch.
        unseen: Notices steps that no optimizer makes; None for a loop with steps.
        measuring: Whether a measurement runs.
        detached: Whether the probe was detached.
    """

    model = WeakModel()

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        schedule: Schedule,
        reader: BatchReader,
        processes: ProcessGroup,
        errors: ErrorHandler,
        account: RunAccount,
        sinks: SinkGroup,
        finish: Callable[[], None],
    ) -> None:
        self.model, self.schedule = model, schedule
        self._config, self._reader, self._processes = config, reader, processes
        self._errors, self._account, self._sinks, self._finish = errors, account, sinks, finish
        self.measuring = self.detached = False
        self.counter = StepCounter(account.first_step)
        self._loop_numbers_steps = True  # until the first step shows whether it does
        self.unseen: UnseenSteps | None = None
        self.measurement = StepMeasurement(
            config=config, reader=reader, processes=processes, errors=errors
        )
        self.capture = BatchCapture(model, self._may_be_measured, self._watch, errors)

    @property
    def active(self) -> bool:
        """Whether it measures."""
        return not self.detached and not self._errors.ended

    @property
    def due(self) -> bool:
        """Whether the next step is to be measured."""
        return self.active and self.counter.is_due(self.schedule)

    @property
    def _likelihood_unknown(self) -> bool:
        return self.active and self._reader.likelihood is None

    def notice_unseen_steps(self, *, counts_changes: bool) -> None:
        """Notice a loop in which no step is ever seen.

        Args:
            counts_changes: Whether changes of the parameters count as steps there.
        """
        # several processes must count alike
        self.unseen = UnseenSteps(counts_changes=counts_changes and self._processes.size == 1)

    def step(self, inputs: Any, number: int | None, found_inf: Tensor | None) -> Report | None:
        """Count a step that the loop makes; measure if it is due.

        Args:
            inputs: Measured in place of the captured batch; None for none.
            number: Number of this step, if the loop has its own count.
            found_inf: Not zero if the optimizer will skip this step; None if it will not.

        Returns:
            The report, or None if nothing was measured.
        """
        self.unseen = None  # the loop has steps
        try:
            return self._step(inputs, number, found_inf)
        except BatchError:
            raise  # in all processes
        except BaseException:
            self._processes.leave()  # the others may be in a measurement that this one will not end
            raise

    def _step(
        self, inputs: Any = None, number: int | None = None, found_inf: Tensor | None = None
    ) -> Report | None:
        """Count one step, as :meth:`step` does."""
        if self.detached:
            return None
        if number is not None:
            self.counter.set(number)
        self._loop_numbers_steps = number is not None
        if found_inf is not None and (self._likelihood_unknown or self.due):
            if bool(torch.as_tensor(found_inf).any()):
                return None  # its batch may be that of another optimizer, which makes its step
            found_inf = None
        seen, captured = self.capture.pop()
        capture_error = self._errors.take_deferred()
        missing = not seen and inputs is None and capture_error is None
        if found_inf is not None or self.counter.has_unread_skips:
            self.counter.record_skip(found_inf, same=missing and self._processes.size == 1)
        if missing:
            self._count_missing_batch()
            if self._processes.size == 1:  # several processes must count alike
                return None
        self._account.num_batches += seen or inputs is not None
        started = time.perf_counter()
        due = inputs is not None or self.due
        step = self.counter.upper_bound
        self.counter.upper_bound += 1
        self.measurement.deferred_error = self.measurement.deferred_error or capture_error
        report = self._infer_and_measure(step, captured, inputs, due=due)
        measured = report is not None or not self.active
        loop_seconds, probe_seconds = self._account.observe_step(started, measured=measured)
        self.schedule.observe(loop_seconds=loop_seconds, probe_seconds=probe_seconds)
        return report

    def _infer_and_measure(
        self, step: int, captured: CapturedBatch | None, inputs: Any, *, due: bool
    ) -> Report | None:
        """Infer the likelihood while it is unknown, and measure if due; errors are logged."""
        started = time.perf_counter()
        try:
            if self._likelihood_unknown:
                self.measurement.infer_likelihood(captured, inputs)
            if self.active and (due or self.measurement.must_fail):
                return self._measure(step, captured, inputs)
        except BatchError as error:
            self._account.why_skipped = f"step {step} was not probed: {error}"
            self.schedule.fail(time.perf_counter() - started)
            if self._errors.raises:
                raise
            # messages that differ in numbers only are one
            key = re.sub(r"\d+", "", str(error))
            self._errors.warn_once(self._account.why_skipped, key)
        except Exception as error:
            self._processes.leave()
            if self._errors.raises:
                raise
            self._errors.end(
                f"probing ended at step {step}, training continues: {describe_error(error)}"
            )
        return None

    def _measure(self, step: int, captured: CapturedBatch | None, inputs: Any) -> Report | None:
        """Measure, and write the report; close the files if the probe was detached meanwhile."""
        self.measuring, self._account.measuring_since = True, time.perf_counter()
        try:
            report = self.measurement.measure(
                self.model,
                step,
                captured,
                inputs,
                schedule=self.schedule,
                loop_seconds=self._account.measuring_since - self._account.last_end,
            )
            if report is not None:
                self._account.coverage = report.coverage
                self._account.num_reports += 1
                self._account.report_seconds += report.seconds
                self._sinks.write(report)
            return report
        finally:
            self.measuring, self._account.measuring_since = False, None
            if self.detached:
                self._finish()

    def _may_be_measured(self) -> bool:
        """Return whether the batch that goes forward now may be measured at its step.

        A schedule's answer holds until the step is observed, however many forwards precede it; only
        a loop that numbers its steps itself may come to another one.
        """
        self._count_unseen_steps()
        return self.active and (self._loop_numbers_steps or self._likelihood_unknown or self.due)

    def _watch(self, captured: CapturedBatch, returned: Any) -> Watched:
        """Return the outputs whose gradients are needed, and what stores them.

        The gradients show the likelihood, the labels of the data and the ignored positions.
        """
        if self.unseen is not None:
            self.unseen.record(self.model)
        due = self.due
        if not due and not self._likelihood_unknown:
            return {}
        labels = due and "empirical" in self._config.estimators
        return self._reader.watch(captured, returned, labels=labels)

    def _count_missing_batch(self) -> None:
        """Count a step without a batch; warn at the third if there never was one."""
        warning = self._account.add_missing_batch(num_evaluations=self.capture.evaluations)
        if warning and self.active:
            self._account.why_skipped = warning
            self._errors.warn_once(warning)

    def _count_unseen_steps(self) -> None:
        """Measure the last batch if the parameters changed since, and no optimizer ever stepped."""
        if self.unseen is None:
            return
        steps = self.unseen.begin_forward(self.model, nested=self.capture.is_running)
        if steps > 1:
            self._errors.warn_once(UNSEEN_WARNING)
            self.measurement.notes.append(LATE_NOTE)
            self.counter.set(self.counter.read() + steps - 1)
        if steps:
            self._step()
