"""The course of one estimate: batch after batch, until the error is reached or the data end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.batches import (
    IndexedSource,
    InputReader,
    NumberedBatch,
    Source,
    empty_data_error,
)
from fimprobe.fisher.streaming.progress import ProgressLine
from fimprobe.fisher.streaming.rounds import (
    Content,
    Limits,
    Position,
    Round,
    RoundReader,
    failed_forward,
)
from fimprobe.fisher.streaming.sampling import PILOT_INPUTS, Pilot, TraceSampler
from fimprobe.fisher.streaming.state import StateFile
from fimprobe.fisher.streaming.stopping import StoppingRule, next_decision
from fimprobe.fisher.sums.accumulation import FisherSums
from fimprobe.fisher.sums.errors_of_sums import SampleDesign, group_errors
from fimprobe.fisher.sums.measurer import DEFAULT_LABELS, Measurer, plan_from_state, plan_to_state
from fimprobe.measurement.arguments import MAX_AUTO_PASSES
from fimprobe.model.batch import Batch

SWITCH = "switch"
"""The end of the first batches where the others are drawn in proportion to τ."""


@dataclass(kw_only=True)
class EstimateRun:
    """One estimate.

    Attributes:
        measurer: Measures batches.
        source: The data.
        reader: From batches to inputs.
        rule: The errors to reach.
        limits: Other ends.
        draws: The option: labels per input, "exact" or "auto".
        input_sampling: "auto", "uniform" or "trace".
        processes: The processes that estimate together.
        file: The state.
        line: The progress.
    """

    measurer: Measurer
    source: Source
    reader: InputReader
    rule: StoppingRule
    limits: Limits
    draws: int | str
    input_sampling: str
    processes: ProcessGroup
    file: StateFile
    line: ProgressLine
    sums: FisherSums = field(init=False)
    position: Position = field(default_factory=Position)
    pilot: Pilot = field(default_factory=Pilot)
    expected: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sampler: TraceSampler | None = None
    started: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with empty sums."""
        self.sums = FisherSums.of(self.measurer.parameters())
        self.rule.resolve(self.sums)
        if self.input_sampling == "trace":
            self.position.phase = "trace"
        self.pilot.decided = self.input_sampling != "auto"

    @property
    def design(self) -> SampleDesign:
        """How the inputs were chosen."""
        replaced = self.position.phase != "uniform"
        ordered = self.source.ordered and not replaced
        return SampleDesign(size=self.source.size, replaced=replaced, ordered=ordered)

    def run(self) -> str:
        """Measure until an end, and return which.

        Raises:
            FimprobeError: If the data or the model do not allow it.
        """
        end = SWITCH
        while end == SWITCH:
            if self.position.phase == "trace":
                self._measure_expected()
                self._change_phase("draws")
            if self.position.phase == "draws":
                self.sampler = TraceSampler(expected=self._all_expected(), seed=self.measurer.seed)
            end = self._stream(self.source)
            if end == SWITCH:
                self._change_phase("trace")
            if end == "repeats" and self.input_sampling == "auto":
                # what the errors depend on is not where τ is large: measure all inputs
                end, self.sampler, self.pilot.decided = SWITCH, None, True
                self._change_phase("uniform")
        self.line.close()
        self.save()
        return end

    def merged(self) -> FisherSums:
        """Return the sums of all processes."""
        if self.processes.size == 1:
            return self.sums
        tensors = self.sums.tensors()
        self.processes.add_tensors(list(tensors.values()))
        return self.sums.with_tensors(tensors)

    def _change_phase(self, phase: str) -> None:
        rounds = self.position.rounds
        self.position = Position(phase=phase, rounds=rounds)
        self.sums = FisherSums.of(self.measurer.parameters())
        if self.processes.size == 1:
            self.save()

    def _batches(self, source: Source) -> Iterator[NumberedBatch]:
        rank, size, skip = self.processes.rank, self.processes.size, self.position.batches
        if self.sampler is not None:
            assert isinstance(source, IndexedSource)
            return self.sampler.batches(source, rank, size, skip)
        return source.batches(rank, size, skip)

    def _stream(self, source: Source) -> str:
        """Measure batches until an end, and return which."""
        batches, reader = self._batches(source), self._round_reader()
        while True:
            end = self._decide()
            if end:
                return end
            read = reader.next(batches, self.position, self.started)
            if read.ended:
                return self._end_of_data()
            self.processes.run_everywhere(lambda: self._measure(read.content))  # noqa: B023
            self._advance(read)
            self.line.update(self.position.inputs, None, None)
            if self.processes.size == 1 and self.file.is_due():
                self.save()
            if read.late:
                return "seconds"

    def _measure(self, content: Content | None) -> None:
        """Add one batch to the sums of this process."""
        if content is None:
            return
        batch, mask, indices = content
        mean = None if self.sampler is None else self.sampler.mean
        position = self.position
        number = position.batches
        try:
            if not position.passes:
                passes, position.exact = self._choose_passes(batch)
                position.passes = passes
            moments = self.measurer.moments(batch, mask, indices, position.labels, mean)
            if not self.pilot.decided and self._may_draw_inputs(batch, mask):
                expected = self.measurer.expected(batch, mask)
                if expected is not None and moments.parameters:
                    self.pilot.add(moments, expected)
        except Exception as error:
            raise _with_batch(number, batch, error) from error
        self.sums.add(moments)

    def _choose_passes(self, batch: Batch) -> tuple[int, bool]:
        """Backward passes per input, and whether they are exact labels."""
        exact = self.measurer.count_passes(batch)
        if self.draws == "exact":
            return exact, True
        if self.draws != "auto":
            return int(self.draws), False
        if self.sampler is not None:  # other inputs are of more use than further labels
            return 1, False
        return (exact, True) if exact <= MAX_AUTO_PASSES else (DEFAULT_LABELS, False)

    def _may_draw_inputs(self, batch: Batch, mask: Tensor | None) -> bool:
        """Whether inputs can be drawn; decides against it otherwise."""
        possible = isinstance(self.source, IndexedSource)
        possible = possible and self.measurer.can_draw_inputs(batch, mask)
        self.pilot.decided = not possible
        return possible

    def _round_reader(self) -> RoundReader:
        return RoundReader(reader=self.reader, processes=self.processes, limits=self.limits)

    def _advance(self, read: Round) -> None:
        self.position.batches += 1
        self.position.next_index += read.inputs
        self.position.inputs += read.inputs
        self.position.measured_batches += sum(1 for size in read.sizes if size)
        self.position.rounds += 1

    def _decide(self) -> str:
        """Return an end that is reached, or an empty text."""
        position = self.position
        if position.measured_batches >= position.decision:
            total = self.merged()
            progress = self.rule.judge(total, self.design)
            self.line.update(position.inputs, progress.rel_error, progress.inputs_needed)
            if progress.reached:
                return "reached"
            if self._switches(total):
                return SWITCH
            position.decision = next_decision(position.measured_batches)
            if self.processes.size > 1:
                self.save()
        if self.limits.inputs is not None and position.inputs >= self.limits.inputs:
            return "inputs"
        return ""

    def _switches(self, total: FisherSums) -> bool:
        """Whether the other inputs are drawn in proportion to τ."""
        size = self.source.size
        if self.position.inputs < PILOT_INPUTS or self.position.phase != "uniform":
            return False
        if not isinstance(self.source, IndexedSource):
            return False
        undecided = not self.pilot.decided
        if not any(self.processes.run_everywhere(lambda: undecided)):
            return False
        names = ("inputs", "expected", "square", "single", "label")
        sums = torch.tensor([getattr(self.pilot, n) for n in names], dtype=torch.float64)
        self.processes.add_tensors([sums])
        pilot = Pilot(**dict(zip(names, sums.tolist(), strict=True)))
        norm = float(group_errors(total, SampleDesign(size=None)).norm[-1])
        target = min(self.rule.targets.values())
        assert size is not None
        limit = min(size, self.limits.inputs or size)
        return pilot.pays(norm**2, target, limit, self.position.passes)

    def _end_of_data(self) -> str:
        if self.sampler is not None:
            return "repeats"
        if self.position.inputs == 0:
            raise empty_data_error()
        self.source.size = self.position.inputs
        total = self.merged()
        if self.rule.judge(total, self.design).at_target:
            return "reached"
        return SWITCH if self._switches(total) else "data"

    def _measure_expected(self) -> None:
        """Measure τ of every input by forward passes."""
        batches, reader = self._batches(self.source), self._round_reader()
        while True:
            read = reader.next(batches, self.position, None)
            if read.ended:
                return
            self.processes.run_everywhere(lambda: self._add_expected(read.content))  # noqa: B023
            self.position.batches += 1
            self.position.rounds += 1
            self.line.update(self.position.batches, None, None)
            if self.processes.size == 1 and self.file.is_due():
                self.save()

    def _add_expected(self, content: Content | None) -> None:
        if content is None:
            return
        batch, mask, indices = content
        try:
            expected = self.measurer.expected(batch, mask)
            possible = expected is not None and self.measurer.can_draw_inputs(batch, mask)
        except Exception as error:
            raise _with_batch(self.position.batches, batch, error) from error
        if not possible:
            raise FimprobeError(
                "`input_sampling='trace'` must have a likelihood with rare labels, got "
                f"{self.measurer.likelihood.name!r}. Use 'auto' or 'uniform'."
            )
        assert expected is not None
        self.expected.append((indices, expected))

    def _all_expected(self) -> Tensor:
        """τ of every input of the data set [N]."""
        assert self.source.size is not None
        total = torch.zeros(self.source.size, dtype=torch.float64)
        for indices, expected in self.expected:
            total[indices] = expected
        self.processes.add_tensors([total])
        return total

    def save(self) -> None:
        """Write the state."""
        indices = [i for i, _ in self.expected]
        self.file.write(
            {
                "position": asdict(self.position),
                "pilot": asdict(self.pilot),
                "sums": self.sums.tensors(),
                "indices": torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64),
                "expected": torch.cat([e for _, e in self.expected])
                if indices
                else torch.zeros(0, dtype=torch.float64),
                "plan": plan_to_state(self.measurer.plan),
                "seconds": time.monotonic() - self.started,
            }
        )

    def resume(self) -> None:
        """Continue from the newest state that every process has, if there is one."""
        stored = self.file.candidates()
        rounds = [state["position"]["rounds"] for state in stored]
        everywhere = self.processes.run_everywhere(lambda: rounds)
        common = set(everywhere[0]).intersection(*everywhere[1:])
        if not common:
            if any(everywhere):
                raise FimprobeError(
                    "`state` must hold the same moment for every process, but the files differ. "
                    "Delete them to start again."
                )
            return
        self._restore(stored[rounds.index(max(common))])

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.position = Position(**state["position"])
        self.pilot = Pilot(**state["pilot"])
        self.sums = self.sums.with_tensors(state["sums"])
        if len(state["indices"]):
            self.expected = [(state["indices"], state["expected"])]
        self.measurer.plan = plan_from_state(state["plan"])
        self.started -= state["seconds"]


def _with_batch(number: int, batch: Batch, error: Exception) -> Exception:
    """The error to raise for a batch: one of the model's own forward names the batch."""
    own = isinstance(error, FimprobeError) and not str(error).startswith(FAILED_MODEL)
    if own or isinstance(error, torch.OutOfMemoryError):
        return error
    return FimprobeError(failed_forward(number, batch, error))


FAILED_MODEL = "the model raises"
"""The beginning of the message of a twin that cannot be compared because the model fails."""
