"""The probe: the one object with state, from ``attach`` to the end of a training."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.errors import BatchError, ErrorHandler, describe_error, guarded
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.weak_model import WeakModel
from fimprobe.probe.arguments import warn_of_contradictions
from fimprobe.probe.closing import write_conclusion
from fimprobe.probe.parts import join_training, make_reader, make_schedule
from fimprobe.probe.registry import make_room, model_key, register, unregister
from fimprobe.probe.run_account import RunAccount
from fimprobe.probe.run_files import open_run_files
from fimprobe.probe.step_cycle import StepCycle
from fimprobe.report.report import Report
from fimprobe.report.run_info import collect_run_info
from fimprobe.sinks.base import Sink
from fimprobe.sinks.sink_group import SinkGroup
from fimprobe.training.batch_reader import Mask
from fimprobe.training.schedule import Schedule


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
        self.errors = ErrorHandler(raises=self.config.on_error == "raise")
        self._reader = make_reader(
            model, self.config, self.errors, mask=mask, labels=labels, output=output, loss=loss
        )
        self._key = model_key(model)
        make_room(model, self.errors, replace=replace)
        warn_of_contradictions(self.config, self.errors)
        self.log_dir: Path | None = None
        self.detached = self._concluded = False
        self._sinks = SinkGroup(sinks, self.errors)
        self._closers: list[Callable[[], None]] = []
        self.processes = join_training(self.errors)
        schedule = make_schedule(self.config, model, shared=self.processes.size > 1)
        with contextlib.ExitStack() as stack:
            stack.callback(self.processes.leave)
            self._reader.set_likelihood(self.config.likelihood)
            self._cycle = StepCycle(
                model,
                self.config,
                schedule=schedule,
                reader=self._reader,
                processes=self.processes,
                errors=self.errors,
                account=self._account,
                sinks=self._sinks,
                finish=self._finish,
            )
            stack.pop_all()
        self._freed = weakref.finalize(model, self.detach)
        self._freed.atexit = False
        try:
            register(self._key, self)
            self._open_files(first_step)
        except BaseException:
            self.detach()
            raise
        self._account.last_end = time.perf_counter()

    def _open_files(self, first_step: int) -> None:
        """Open the files; processes other than the first keep reports in ``history`` only."""
        if self.active and self.processes.rank == 0:
            self.log_dir = open_run_files(
                self._sinks,
                self.config,
                schedule=self._cycle.schedule,
                overhead=lambda: self._account.overhead,
                describe_run=lambda: collect_run_info(
                    self.model,
                    self.config,
                    likelihood=self.likelihood,
                    decision=self.decision,
                    processes=self.processes.size,
                ),
                first_step=first_step,
            )

    # -- what users read ---------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far.

        Reading it waits for the device if GradScaler leaves to the device whether a step is made
        (fused optimizers).
        """
        return self._cycle.counter.read()

    @steps.setter
    def steps(self, number: int) -> None:
        self._cycle.counter.set(number)

    @property
    def active(self) -> bool:
        """Whether it measures; False once it is detached, and after an error that ended probing."""
        return self._cycle.active

    @property
    def due(self) -> bool:
        """Whether the next step is to be measured."""
        return self._cycle.due

    @property
    def likelihood(self) -> Likelihood | None:
        """The distribution of labels; None while ``"auto"`` is undecided."""
        return self._reader.likelihood

    @property
    def decision(self) -> str:
        """How the likelihood was decided."""
        return self._reader.decision

    @property
    def schedule(self) -> Schedule:
        """Decides which steps are measured."""
        return self._cycle.schedule

    @property
    def coverage(self) -> dict[str, str]:
        """How the last report measured each parameter, or why it did not."""
        return self._account.coverage

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
        self.detached = self._cycle.detached = True
        model_exists = self._freed.detach() is not None
        closers = [] if self._cycle.measuring else [self._finish]
        closers += [*self._closers, *([self._cycle.capture.remove] if model_exists else [])]
        closers += [lambda: unregister(self._key, self), self._end_by_late_error]
        with contextlib.ExitStack() as stack:  # the last one first, each whatever the others raise
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
        return self._cycle.step(inputs, number, found_inf)

    def notice_unseen_steps(self, *, counts_changes: bool) -> None:
        """Notice a loop in which no step is ever seen, for ``attach``.

        Args:
            counts_changes: Whether changes of the parameters count as steps there.
        """
        self._cycle.notice_unseen_steps(counts_changes=counts_changes)

    @property
    def backward_done(self) -> bool:
        """Whether the captured batch has its parameter gradients already."""
        return self._cycle.capture.backward_done

    @guarded()
    def discard_batch(self, error: BatchError | None = None) -> None:
        """Forget the captured batch, for adapters that know it is not to be measured.

        Args:
            error: Reported by the next ``step``, in place of a measurement.
        """
        self._cycle.capture.discard()
        self.errors.deferred = error or self.errors.deferred

    def _end_by_late_error(self) -> None:
        """State an error of a hook that no step treats any more."""
        error = self.errors.take_deferred()
        if error is not None:
            self.errors.end(f"an error after the last step: {describe_error(error)}")

    def _finish(self) -> None:
        """State how the training ended, close the files, and leave the other processes."""
        with contextlib.ExitStack() as stack:  # the last one first, each whatever the others raise
            stack.callback(self.processes.leave)
            stack.callback(self._sinks.close)
            stack.callback(self._conclude)

    def _conclude(self) -> None:
        """State what was measured, or why nothing was; write why probing ended."""
        if self._concluded or self.processes.rank > 0:
            return
        self._concluded = True
        self.errors.run_safely(
            lambda: write_conclusion(
                self._account,
                self._sinks,
                self.errors,
                config=self.config,
                schedule=self._cycle.schedule,
                reader=self._reader,
                unseen=self._cycle.unseen,
                steps=self._cycle.counter.upper_bound,
                log_dir=self.log_dir,
            ),
            "the closing paragraph could not be written",
        )
