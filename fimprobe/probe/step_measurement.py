"""The measurement of one optimizer step, made by all processes together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fimprobe.config.config import Config
from fimprobe.distributed.processes import ProcessGroup
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import ErrorHandler, FimprobeError
from fimprobe.measurement.measure import measure
from fimprobe.measurement.second_order_engine import SPOT_CHECKS
from fimprobe.probe.notices import announce
from fimprobe.probe.second_order_choice import (
    recurring_share,
    share_of_i2,
    why_i2_says_nothing,
)
from fimprobe.report.error_advice import LAST_KNOWN, OPTION
from fimprobe.report.format import percent, quantity
from fimprobe.report.partial_reports import NO_BOUNDS_NOTE, PREVIEW
from fimprobe.report.record import TRUSTED_ERROR, inputs_needed
from fimprobe.report.report import Report
from fimprobe.training.batch_reader import BatchReader
from fimprobe.training.capture.captured_batch import CapturedBatch
from fimprobe.training.probe_batch import ProbeBatch, select_samples
from fimprobe.training.report_costs import Extent
from fimprobe.training.schedule import FREE_SECONDS, Budget, Schedule
from fimprobe.training.shared_budget import SharedBudget

_LABEL_SEED_STEP = 1_000_003
_ROW_SEED_STEP = 7919
"""Difference of the seeds of two steps, for labels and for the choice of rows. They are two primes:
no two steps share a stream of random numbers, and labels are independent of the rows."""


@dataclass(kw_only=True)
class StepMeasurement:
    """Measures the batches of all processes; keeps what is reused from step to step.

    Attributes:
        config: The options.
        reader: Selects batches, and holds the likelihood.
        processes: The processes of the training.
        errors: Treats errors.
        deferred_error: An error of this process, which the next measurement raises in all.
        plan: How parameters are reached.
        notes: Notes of every report.
        without_i2: Why Î₂ is left out by now, what that saves and how to keep it; "" if it is not.
    """

    config: Config
    reader: BatchReader
    processes: ProcessGroup
    errors: ErrorHandler
    deferred_error: Exception | None = None
    plan: Plan = field(default_factory=Plan)
    notes: list[str] = field(default_factory=list)
    without_i2: str = ""
    _is_i2_judged: bool = False
    _last_known: str = ""

    @property
    def must_fail(self) -> bool:
        """Whether an error waits that this process can raise without the others."""
        return self.deferred_error is not None and self.processes.size == 1

    @property
    def _is_i2_asked(self) -> bool:
        """Whether an option asks for Î₂, at any cost."""
        return bool(self.config.model_fields_set & {"estimators", "second_order"})

    def infer_likelihood(self, captured: CapturedBatch | None, inputs: Any) -> None:
        """Infer the likelihood from the batch or, if None was captured, from given inputs.

        An error is kept in ``deferred_error``, and the next measurement raises it.

        Args:
            captured: The training batch, or None.
            inputs: Inputs of the model [B, ...], or None.
        """
        if captured is not None:
            self._defer_error(lambda: self.reader.infer_from_batch(captured))
        elif inputs is not None:
            self._defer_error(lambda: self.reader.infer_from_inputs(inputs))

    def measure(
        self,
        model: nn.Module,
        step: int,
        captured: CapturedBatch | None,
        inputs: Any,
        *,
        schedule: Schedule,
        loop_seconds: float,
    ) -> Report | None:
        """Return one report of all processes' batches; None while the likelihood is unknown.

        Args:
            model: The object that the loop calls.
            step: Number of the step.
            captured: The training batch.
            inputs: Inputs to measure in its place; None for none.
            schedule: Decides what it contains.
            loop_seconds: Time of the training loop since the last step.

        Raises:
            BatchError: If the batch of some process cannot be measured.
            FimprobeError: If measurements fail, or processes are at different steps.
        """
        started = time.perf_counter()
        selected: list[ProbeBatch] = []

        def select() -> str | None:
            """Return what this process will measure, to be compared with the others."""
            error, self.deferred_error = self.deferred_error, None
            if error is not None:
                raise error
            if self.reader.likelihood is None:
                return None
            selected.append(self._select(step, captured, inputs))
            return f"{self.reader.likelihood.name} at step {step}"

        subjects = self.processes.run_everywhere(select)
        if None in subjects:
            return None
        if len(set(subjects)) > 1:
            raise FimprobeError(
                f"all processes must measure the same, got {', '.join(map(str, subjects))}. "
                "Attach at the same place and call the optimizer equally often on every process."
            )
        notes = self.notes + self.reader.notes(captured if inputs is None else None)
        if captured is not None:
            captured.release()  # the measurement needs the memory
        extent = self._start(schedule, loop_seconds, full=inputs is not None)
        if not self._is_i2_asked:
            self.plan.second_order_limit = schedule.affordable_steps()
        report = self._measure_batch(model, step, selected[0], extent)
        schedule.expect(recurring_share(report))
        if self.without_i2:
            notes.append(self.without_i2)
        notes += self._explain_unknown_error(report)
        if notes:
            report = replace(report, notes=[*report.notes, *notes])
        if extent is not Extent.PREVIEW and not self._is_i2_judged:
            self._judge_i2(report, schedule)
            self._compare_with_requests(report, inputs)
        if isinstance(schedule, SharedBudget):
            forecast = schedule.forecast
            seconds = time.perf_counter() - started
            # the clocks of processes differ: the forecast of the first one counts for all
            schedule.next = self.processes.run_everywhere(lambda: forecast(step, seconds))[0]
        return report

    def _start(self, schedule: Schedule, loop_seconds: float, *, full: bool) -> Extent:
        """Return what the measurement contains, the same in all processes.

        Args:
            schedule: Decides it.
            loop_seconds: Time of the training loop since the last step.
            full: Whether it is to contain everything.
        """
        extent = schedule.start(full=full, loop_seconds=loop_seconds)
        if isinstance(schedule, SharedBudget):
            # the clocks of processes differ: that of the first one counts for all
            extent = schedule.agree(self.processes.run_everywhere(lambda: extent)[0])
        return extent

    def _select(self, step: int, captured: CapturedBatch | None, inputs: Any) -> ProbeBatch:
        """Return what this process measures, its part of the option ``batch``."""
        selected = select_samples(
            self.reader,
            captured,
            inputs,
            estimators=self.config.estimators,
            max_size=-(-self.config.batch // self.processes.size),
            seed=self.config.seed + _ROW_SEED_STEP * step,
        )
        error = selected.labels_error
        if error is not None:
            if self.errors.raises:
                raise error
            self.errors.warn_once(f"step {step}, no empirical Fisher: {error}", str(error))
        return selected

    def _measure_batch(
        self, model: nn.Module, step: int, selected: ProbeBatch, extent: Extent
    ) -> Report:
        """Measure with the options of the configuration.

        Args:
            model: The object that the loop calls.
            step: Number of the step.
            selected: The batch.
            extent: What is measured of it.
        """
        assert self.reader.likelihood is not None
        config, setting = self.config, self.config.second_order
        second_order = setting if isinstance(setting, str) else setting.model_dump()
        leaves_out_i2 = extent is Extent.PREVIEW or bool(self.without_i2)
        estimators = [e for e in selected.estimators if not (leaves_out_i2 and e == "i2")]
        report = measure(
            model,
            selected.batch,
            likelihood=self.reader.likelihood,
            draws=config.draws,
            label_sampling=config.label_sampling,
            estimators=estimators or ["i1"],
            second_order="off" if leaves_out_i2 else second_order,
            bounds=config.bounds and extent is Extent.WHOLE,
            engine=config.engine,
            labels=selected.labels,
            mask=selected.mask,
            output=self.reader.output,
            memory_mb=config.memory_mb,
            seed=config.seed + _LABEL_SEED_STEP * step,
            step=step,
            plan=self.plan,
            ranks=self.processes,
        )
        if extent is Extent.WHOLE:
            return report
        note = NO_BOUNDS_NOTE if extent is Extent.WITHOUT_BOUNDS else self._preview_note()
        return replace(report, notes=[*report.notes, note])

    def _preview_note(self) -> str:
        """Return the note of a preview: what it leaves out, and why."""
        has_i2 = "i2" in self.config.estimators and not self.without_i2
        parts = [*(["Î₂"] if has_i2 else []), *(["the bounds"] if self.config.bounds else [])]
        return (
            f"{PREVIEW}only Î₁ was measured, because a report with {' and '.join(parts)} is expected "
            f"to take more than what is left of the {FREE_SECONDS:g} s that early reports may take "
            'together, and of the time budget. Use schedule={"every": 100} to measure everything at '
            "each report."
        )

    def _explain_unknown_error(self, report: Report) -> list[str]:
        """Return the option for more inputs, and the last known error; none where it is known."""
        total, size, notes = report.total.i1, report.batch_size, []
        if total.rel_error is not None:
            self._last_known = f"{LAST_KNOWN}step {report.step:,}: {percent(total.rel_error)}"
            if total.rel_error > TRUSTED_ERROR:
                needed = quantity(inputs_needed(total.rel_error, size), "input")
                self._last_known += f", an error of 10 % takes {needed}"
            return []
        if "more inputs" in total.unknown.get("rel_error", "") and size >= self.config.batch:
            notes.append(
                f"{OPTION}{size}: {4 * size} measures more, of a training batch that has as many."
            )
        return [*notes, f"{self._last_known}."] if self._last_known else notes

    def _judge_i2(self, report: Report, schedule: Schedule) -> None:
        """Leave Î₂ out under a budget where the first whole report shows that it says nothing.

        Args:
            report: The first whole report, the same in all processes.
            schedule: That of the training.
        """
        self._is_i2_judged = True
        account = schedule.account if isinstance(schedule, SharedBudget) else schedule
        if not isinstance(account, Budget):
            return  # the advice of the report compares the estimators
        is_sampled = self.plan.second_order == SPOT_CHECKS
        if not is_sampled:  # only spot checks need no double backward, which bounds need
            account.costs.include_bounds()
        reason = why_i2_says_nothing(report, of_layers=not is_sampled)
        if not reason or self._is_i2_asked:
            return
        share = share_of_i2(report)
        schedule.expect(max(recurring_share(report) - share, 0.0))
        account.costs.leave_out_i2(has_bounds=self.config.bounds)
        self.without_i2 = (
            f"Î₂ is left out after step {report.step}, because {reason}. This saves about "
            f"{percent(share)} of the seconds of a report. Pass estimators=['i1', 'i2'] to keep it."
        )
        self.errors.warn_once(self.without_i2)

    def _compare_with_requests(self, report: Report, inputs: Any) -> None:
        """State what the options ask for and the first whole report does not have.

        Args:
            report: The report.
            inputs: The inputs that were given in place of a training batch; None for none.
        """
        batch, size = self.config.batch, report.batch_size
        is_first = self.processes.rank == 0
        if "batch" in self.config.model_fields_set and size < batch and is_first:
            announce(
                f"`batch` is {batch}, and the training batch has {quantity(size, 'input')}: all of "
                "them are measured. Where gradients accumulate, the last micro-batch is measured."
            )
        if inputs is not None and "empirical" in self.config.estimators:
            self.errors.warn_once(
                "no empirical Fisher is measured for inputs given to probe.step(inputs), since they "
                "have no loss and no labels of the data"
            )

    def _defer_error(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.deferred_error = error
