"""The probe: the one object with state. It sees batches, decides when, measures and reports."""

from __future__ import annotations

import functools
import logging
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.distributed.processes import ProcessGroup, SingleProcess, join
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods.base import Likelihood
from fimprobe.measurement.measure import measure
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp import check_sharded, is_sharded
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import trainable, unwrap
from fimprobe.report.report import Report
from fimprobe.report.run_info import collect_run_info
from fimprobe.sinks.base import Sink
from fimprobe.sinks.folder_lock import FolderLock
from fimprobe.sinks.jsonl import FILE_NAME, JsonlSink
from fimprobe.sinks.memory import MemorySink
from fimprobe.training.batch_reader import BatchReader, Mask
from fimprobe.training.capture import BatchCapture, CapturedBatch, Watched
from fimprobe.training.schedule import Budget, SharedBudget
from fimprobe.training.skipped_steps import SkippedSteps

logger = logging.getLogger("fimprobe")


class ProbeBatch(NamedTuple):
    """What one process measures."""

    batch: Batch
    mask: Tensor | None
    labels: Tensor | None
    estimators: Sequence[str]


_probed: set[int] = set()

PREVIEW_NOTE = (
    "A first look: Î₂, bounds and what belongs to them follow once the schedule's budget has room; "
    'schedule={"every": 100} measures everything from the first step on.'
)


class Probe:
    """Watches one model's training; made by :func:`fimprobe.attach`.

    ``step()`` is called once for each optimizer step, before the parameters change. Whatever fails
    inside is told once through the logger ``fimprobe`` and never reaches the training loop (unless
    ``on_error="raise"``): a batch that cannot be probed is skipped, any other error ends probing.

    ``first_step``: the number of the step that a training resumes at; what the run's files hold of
    it and of later steps is superseded.
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
        if not isinstance(model, nn.Module):
            raise FimprobeError(f"model={type(model).__name__} is no torch.nn.Module")
        if not trainable(model):
            raise FimprobeError(
                "the model has no trainable parameters (requires_grad is False everywhere); "
                "nothing to measure"
            )
        for name, given in (("mask", mask), ("labels", labels), ("output", output)):
            if given is not None and not callable(given):
                takes = (
                    "what the model returns" if name == "output" else "the forward's (args, kwargs)"
                )
                raise FimprobeError(
                    f"{name}={type(given).__name__} is no function; pass one from {takes} to a tensor"
                )
        asked = config or Config()
        if is_sharded(model):
            check_sharded(
                model,
                estimators=asked.estimators,
                bounds=asked.bounds,
                draws=asked.draws,
                engine=asked.engine,
            )
        self._key = id(unwrap(model))
        if self._key in _probed:
            raise FimprobeError(
                "this model already has a probe; call detach() on the first one before attaching "
                "another"
            )
        self.model = model
        self.config = asked
        self.ranks: ProcessGroup = SingleProcess()
        self.schedule = self.config.schedule.build()
        if isinstance(self.schedule, Budget):
            self.schedule.staged = asked.bounds or "i2" in asked.estimators
        self._steps = self._first_step = first_step
        self._skips = SkippedSteps()
        self.coverage: dict[str, str] = {}
        self.active = True
        self.detached = False
        self._reader = BatchReader(
            model, mask=mask, labels=labels, output=output or select_outputs, tell=self._tell
        )
        self._plan = Plan()
        self._memory = MemorySink()
        self._sinks: list[Sink] = [self._memory, *(sinks or [])]
        self._told: set[str] = set()
        self._failure: Exception | None = None
        self._loop_numbers_steps = True  # until the first step tells
        self._batches = self._without_batch = 0
        self._closers: list[Callable[[], None]] = []
        self._join()
        self.log_dir = self._open_sinks()
        self._reader.settle(self.config.likelihood)
        self._capture = BatchCapture(model, self._wanted, self._watch)
        _probed.add(self._key)
        self._last_end = time.perf_counter()
        self._attaching = self._last_end - started  # until a measurement's account holds it

    # -- what users read ---------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far.

        Where GradScaler leaves it to the device whether a step is made (fused optimizers), reading
        this waits for the device.
        """
        if self._skips:
            self._steps -= self._skips.settle()
        return self._steps

    @steps.setter
    def steps(self, number: int) -> None:
        self._steps = number
        self._skips.clear()

    @property
    def due(self) -> bool:
        """Whether the step that comes next is to be measured."""
        if not self.active or not self.schedule.due(self._steps):
            return False
        return not self._skips or self.schedule.due(self.steps)

    @property
    def likelihood(self) -> Likelihood | None:
        """The family of the labels; None while ``"auto"`` is undecided."""
        return self._reader.likelihood

    @property
    def decision(self) -> str:
        """How the likelihood was decided."""
        return self._reader.decision

    @property
    def history(self) -> list[Report]:
        """The last 1,000 reports, oldest first."""
        return list(self._memory.reports)

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self._memory.reports[-1] if self._memory.reports else None

    def __enter__(self) -> Probe:
        """Use as ``with fimprobe.attach(model) as probe:``."""
        return self

    def __exit__(self, *error: object) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Take every hook off, close the files. Calling it again does nothing."""
        if self.detached:
            return
        self.detached, self.active = True, False
        _probed.discard(self._key)
        for close in self._closers:
            close()
        self._capture.remove()
        for sink in self._sinks:
            self._guarded(sink.close, f"{type(sink).__name__} could not be closed")

    def on_detach(self, close: Callable[[], None]) -> None:
        """Have ``close`` called by ``detach`` (for adapters that hook something of their own)."""
        self._closers.append(close)

    # -- what adapters call ------------------------------------------------------------------

    def step(
        self, inputs: Any = None, *, number: int | None = None, found_inf: Tensor | None = None
    ) -> Report | None:
        """Count one optimizer step; measure where the schedule says so, before parameters change.

        ``inputs`` stands in for the captured batch (then the measurement is made in any case; of
        several processes, all have to give theirs at the same step).
        ``number`` is this step's, where the loop has a count of its own; the next follows it.
        ``found_inf``: not zero where the optimizer will leave this step out, as GradScaler tells a
        fused one; it is read only where the step is due.
        Returns the report, or None where nothing was measured.
        """
        if self.detached:
            return None
        if number is not None:
            self.steps = number
        self._loop_numbers_steps = number is not None
        if found_inf is not None and (self._likelihood_unknown or self.due):
            if bool(torch.as_tensor(found_inf).any()):
                return None  # its batch may be another optimizer's, which makes its step
            found_inf = None
        seen, captured = self._capture.take()
        failed, self._capture.failed = self._capture.failed, None
        nothing = not seen and inputs is None and failed is None
        if found_inf is not None or self._skips:
            self._skips.note(found_inf, same=nothing and self.ranks.size == 1)
        if nothing:
            self._no_batch()
            if self.ranks.size == 1:  # several processes have to count alike
                return None
        self._batches += seen or inputs is not None
        started = time.perf_counter()
        due = inputs is not None or self.due
        step = self._steps
        self._steps += 1
        report = None
        try:
            self._failure = self._failure or failed
            if self._likelihood_unknown and captured is not None:
                self._try(lambda: self._reader.ask(captured))
            elif self._likelihood_unknown and inputs is not None:
                self._try(lambda: self._reader.infer_from_inputs(inputs))
            if self.active and (due or (self._failure is not None and self.ranks.size == 1)):
                report = self._measure(step, captured, inputs)
        except BatchError as error:
            if self.config.on_error == "raise":
                raise
            self._tell(f"step {step} was not probed: {error}", key=re.sub(r"\d+", "", str(error)))
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            self.active = False
            kind = "" if isinstance(error, FimprobeError) else f"{type(error).__name__}: "
            self._tell(f"probing ended at step {step}, training goes on: {kind}{error}")
        ended = time.perf_counter()
        probing = 0.0
        if report is not None or not self.active:
            probing, self._attaching = ended - started + self._attaching, 0.0
        looping = max(started - self._last_end, 0.0)
        self.schedule.observe(loop_seconds=looping, probe_seconds=probing)
        self._last_end = ended
        return report

    # -- inside ------------------------------------------------------------------------------

    def _measure(self, step: int, captured: CapturedBatch | None, inputs: Any) -> Report | None:
        """One report of all processes' batches; None where the likelihood is not known yet."""
        share: ProbeBatch | None = None

        def prepare() -> str | None:
            nonlocal share
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            if self.likelihood is None:
                return None
            share = self._select_batch(step, captured, inputs)
            return f"{self.likelihood.name} at step {step}"

        started = time.perf_counter()
        told = self.ranks.together(prepare)
        if None in told or share is None:
            return None
        if len(set(told)) > 1:
            raise FimprobeError(f"the processes do not measure the same: {', '.join(map(str, told))}")
        assert self.likelihood is not None
        if captured is not None:
            captured.drop()  # the measurement needs memory
        second = self.config.second_order
        how = second if isinstance(second, str) else second.model_dump()
        look = self.schedule.begin(whole=inputs is not None)
        wanted = [e for e in share.estimators if not (look and e == "i2")]
        report = measure(
            self.model,
            share.batch,
            likelihood=self.likelihood,
            draws=self.config.draws,
            label_sampling=self.config.label_sampling,
            estimators=wanted or ["i1"],
            second_order="off" if look else how,
            bounds=self.config.bounds and not look,
            engine=self.config.engine,
            labels=share.labels,
            mask=share.mask,
            output=self._reader.output,
            memory_mb=self.config.memory_mb,
            seed=self.config.seed + 1_000_003 * step,
            step=step,
            plan=self._plan,
            ranks=self.ranks,
        )
        if look:
            report = replace(report, notes=[*report.notes, PREVIEW_NOTE])
        if isinstance(self.schedule, SharedBudget):
            forecast = self.schedule.forecast
            running = time.perf_counter() - started
            self.schedule.next = self.ranks.together(lambda: forecast(step, running))[0]
        self.coverage = report.coverage
        for sink in list(self._sinks):
            write = functools.partial(sink.write, report)
            if not self._guarded(write, f"{type(sink).__name__} failed"):
                self._sinks.remove(sink)
        return report

    def _select_batch(self, step: int, captured: CapturedBatch | None, inputs: Any) -> ProbeBatch:
        """What this process measures: its batch, cut to size, with what belongs to it."""
        mask = labels = None
        wanted = list(self.config.estimators)
        if inputs is not None:
            batch = Batch.of(inputs)
            mask = self._reader.mask_of(batch.args, batch.kwargs)
            wanted = [e for e in wanted if e != "empirical"] or ["i1"]
        else:
            if captured is None:
                raise BatchError("no training batch was captured")
            if not captured.unchanged():
                raise BatchError("the batch was changed in place after the forward pass")
            batch = Batch.of_call(captured.args, captured.kwargs)
            mask = self._reader.mask_of(captured.args, captured.kwargs, captured)
            if "empirical" in wanted:
                try:
                    labels = self._reader.labels_of(captured, batch.size)
                except BatchError as error:  # the other estimators need no labels of the data
                    if self.config.on_error == "raise":
                        raise
                    self._tell(f"step {step}, no empirical Fisher: {error}", key=str(error))
                    wanted = [e for e in wanted if e != "empirical"] or ["i1"]
        most = -(-self.config.batch // self.ranks.size)
        if batch.size > most:
            generator = torch.Generator().manual_seed(self.config.seed + 7919 * step)
            rows = torch.randperm(batch.size, generator=generator)[:most].sort()[0]
            batch = batch[rows]
            mask = None if mask is None else mask[rows.to(mask.device)]
            labels = None if labels is None else labels[rows.to(labels.device)]
        return ProbeBatch(batch, mask, labels, wanted)

    def _try(self, action: Callable[[], None]) -> None:
        """Keep an error for the next measurement, which all processes make together."""
        try:
            action()
        except Exception as error:
            self._failure = error

    def _join(self) -> None:
        """Meet the other processes of this training."""
        try:
            self.ranks = join()
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            self.active = False
            kind = "" if isinstance(error, FimprobeError) else f"{type(error).__name__}: "
            self._tell(f"nothing is probed: {kind}{error}")
        if self.ranks.size > 1 and isinstance(self.schedule, Budget):
            self.schedule = SharedBudget(self.schedule)

    @property
    def _likelihood_unknown(self) -> bool:
        return self.active and self._reader.likelihood is None

    def _wanted(self) -> bool:
        """Whether the batch that goes forward now may be measured at its step.

        A schedule's answer holds until the step is observed, however many forwards lead to it;
        only a loop that numbers its steps itself may come to another one.
        """
        return self.active and (self._loop_numbers_steps or self._likelihood_unknown or self.due)

    def _watch(self, captured: CapturedBatch, out: Any) -> Watched | None:
        """The output tensor whose gradient is needed: to infer, and to see ignored positions."""
        due, undecided = self.due, self._likelihood_unknown
        empirical = due and "empirical" in self.config.estimators
        positions = due and self.config.likelihood == "auto"
        if not (undecided or empirical or positions):
            return None
        try:
            tensor = self._reader.output(out)
        except Exception:  # said at the measurement, where it matters
            return None
        if not isinstance(tensor, Tensor):
            return None
        if undecided or empirical:
            captured.outputs = tensor.detach()
            return tensor, CapturedBatch.keep
        return (tensor, self._reader.see) if tensor.dim() > 2 else None

    def _no_batch(self) -> None:
        self._without_batch += 1
        if self._without_batch == 3 and not self._batches and self.active:
            why = (
                "its forward passes ran in eval mode; call model.train() while training"
                if self._capture.evaluations
                else "no forward pass of the attached object was seen; attach to the object that "
                "the loop calls, after torch.compile and other wrappers"
            )
            self._tell(
                f"the optimizer steps, but no training batch was captured: {why}, or call "
                "probe.step(inputs) yourself"
            )

    def _open_sinks(self) -> Path | None:
        config = self.config
        default = Path("runs/fimprobe") / f"{datetime.now():%Y%m%d-%H%M%S-%f}_{socket.gethostname()}"
        log_dir = default
        if config.tensorboard and config.tensorboard.log_dir is not None:
            log_dir = Path(config.tensorboard.log_dir)
        superseded = self._first_step or None

        def board() -> None:
            from fimprobe.sinks.tensorboard.sink import TensorboardSink

            layers, wanted = config.layers, config.tensorboard
            assert wanted is not False
            self._sinks.append(
                TensorboardSink(
                    log_dir,
                    top=layers.top,
                    include=layers.include,
                    exclude=layers.exclude,
                    run=self._describe,
                    histograms=wanted.histograms,
                    figures=wanted.figures,
                    schedule=self.schedule,
                    purge_step=superseded,
                )
            )

        def lines() -> None:
            path = config.jsonl or log_dir / FILE_NAME
            if not written and not config.jsonl:  # the lines of two writers would mix
                taken = FolderLock(log_dir, take_over=superseded is not None)
                self._closers.append(taken.release)
            self._sinks.append(JsonlSink(path, run=self._describe, purge_step=superseded))

        if self.ranks.rank > 0 or not self.active:  # reports stay in probe.history
            return None
        remedy = "pass another log_dir; reports stay in probe.history"
        what = f"tensorboard log_dir={str(log_dir)!r} cannot be written ({remedy})"
        written = bool(config.tensorboard) and self._guarded(board, what, key="log_dir")
        if config.jsonl is not False and (config.tensorboard or config.jsonl):
            where = str(config.jsonl or log_dir / FILE_NAME)
            what = f"jsonl={where!r} cannot be written ({remedy})"
            # below log_dir, what hindered TensorBoard hinders this: told once
            self._guarded(lines, what, key="jsonl" if config.jsonl else "log_dir")
        return log_dir if written else None

    def _describe(self) -> dict[str, Any]:
        return collect_run_info(
            self.model,
            self.config,
            likelihood=self.likelihood,
            decision=self.decision,
            processes=self.ranks.size,
        )

    def _guarded(self, action: Callable[[], None], what: str, key: str | None = None) -> bool:
        try:
            action()
        except Exception as error:
            if self.config.on_error == "raise":
                raise FimprobeError(f"{what}: {error}") from error
            self._tell(f"{what}: {error}", key=key)
            return False
        return True

    def _tell(self, message: str, key: str | None = None) -> None:
        key = key or message
        if key not in self._told:
            self._told.add(key)
            logger.warning("fimprobe: %s", message)
