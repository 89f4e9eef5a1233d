"""The course of one estimate: batch after batch, until the error is reached or the data end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.fisher.streaming.batches import (
    IndexedSource,
    NumberedBatch,
    Source,
    empty_data_error,
)
from fimprobe.fisher.streaming.expected_scores import (
    ExpectedScores,
    is_same_input,
    note_varying_inputs,
)
from fimprobe.fisher.streaming.label_order import LabelOrder
from fimprobe.fisher.streaming.output_checks import probabilities_note
from fimprobe.fisher.streaming.progress import ProgressLine
from fimprobe.fisher.streaming.reading import InputReader
from fimprobe.fisher.streaming.rounds import (
    Content,
    Limits,
    Position,
    Round,
    RoundReader,
    with_batch,
)
from fimprobe.fisher.streaming.sampling import (
    LABEL_STREAM,
    PILOT_INPUTS,
    Pilot,
    TraceSampler,
    choose_passes,
)
from fimprobe.fisher.streaming.state import StateFile, check_content, content_checksum
from fimprobe.fisher.streaming.stopping import StoppingRule, next_decision
from fimprobe.fisher.sums.accumulation import FisherSums
from fimprobe.fisher.sums.errors_of_sums import SampleDesign, group_errors
from fimprobe.fisher.sums.measurer import Measurer, plan_from_state, plan_to_state
from fimprobe.model.batch import Batch

SWITCH = "switch"
"""The end of the first batches where the others are drawn in proportion to τ."""

VARIES = "varies"
"""The end of drawing where the data yield other inputs each time they are read."""


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
    expected: ExpectedScores = field(default_factory=ExpectedScores)
    sampler: TraceSampler | None = None
    order: LabelOrder = field(default_factory=LabelOrder)
    checksum: int = 0
    began: float = field(default_factory=time.monotonic)
    """When this call began, which limits its time."""
    earlier_seconds: float = 0.0
    _drawn_inputs_checked: bool = False

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
        stream = ordered and self.source.is_stream(self.processes.size)
        size = self.source.size
        return SampleDesign(size=size, replaced=replaced, ordered=ordered, stream=stream)

    @property
    def seconds(self) -> float:
        """Time of this call and of those that it continues."""
        return self.earlier_seconds + time.monotonic() - self.began

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
                assert self.source.size is not None
                expected = self.expected.total(self.source.size, self.processes)
                self.sampler = TraceSampler(expected=expected, seed=self.measurer.seed)
            end = self._stream(self.source)
            if end == SWITCH:
                self._change_phase("trace")
            if end == VARIES:
                note_varying_inputs(self.reader, self.input_sampling)
            if end in ("repeats", VARIES) and self.input_sampling == "auto":
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
            read = reader.next(batches, self.position, self.began)
            if read.ended:
                return self._end_of_data()
            if not all(self.processes.run_everywhere(lambda: self._measure(read.content))):  # noqa: B023
                return VARIES
            self._advance(read)
            self.line.update(self.position.inputs, None, None)
            if self.processes.size == 1 and self.file.is_due():
                self.save()
            if read.late:
                return "seconds"

    def _measure(self, content: Content | None) -> bool:
        """Add one batch to the sums of this process; return whether its inputs are those of τ."""
        if content is None:
            return True
        batch, mask, indices = content
        mean = None if self.sampler is None else self.sampler.mean
        position = self.position
        number = position.batches
        try:
            if not self._is_drawn_input(content):
                return False
            if not position.passes:
                passes, position.exact = choose_passes(
                    self.measurer, batch, self.draws, drawn_inputs=self.sampler is not None
                )
                position.passes = passes
                outputs = self.measurer.outputs(batch, mask)
                self.reader.note(probabilities_note(self.measurer.likelihood.name, outputs))
            moments = self.measurer.moments(batch, mask, indices, position.labels, mean)
            if not self.pilot.decided and self._may_draw_inputs(batch, mask):
                expected = self.measurer.expected(batch, mask)
                if expected is not None and moments.parameters:
                    self.pilot.add(moments, expected)
        except Exception as error:
            raise with_batch(number, batch, error) from error
        self.sums.add(moments)
        self.sums.sorted_labels = self.order.is_sorted()
        return True

    def _is_drawn_input(self, content: Content) -> bool:
        """Whether the first drawn inputs have the τ with which they were drawn."""
        batch, mask, indices = content
        if self.sampler is None or self._drawn_inputs_checked:
            return True
        self._drawn_inputs_checked = True
        measured = self.measurer.expected(batch, mask)
        stored = self.sampler.expected[self.sampler.draw(indices - LABEL_STREAM)]
        return measured is None or is_same_input(stored, measured)

    def _may_draw_inputs(self, batch: Batch, mask: Tensor | None) -> bool:
        """Whether inputs can be drawn; decides against it otherwise."""
        possible = isinstance(self.source, IndexedSource)
        possible = possible and self.measurer.can_draw_inputs(batch, mask)
        self.pilot.decided = not possible
        return possible

    def _round_reader(self) -> RoundReader:
        return RoundReader(
            reader=self.reader, processes=self.processes, limits=self.limits, order=self.order
        )

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
        pilot = self.pilot.merged(self.processes)
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
        try:
            self.expected.add(self.measurer, content)
        except Exception as error:
            raise with_batch(self.position.batches, content[0], error) from error

    def save(self) -> None:
        """Write the state."""
        self.file.write(
            {
                "position": asdict(self.position),
                "pilot": asdict(self.pilot),
                "sums": self.sums.tensors(),
                "expected": self.expected.to_state(),
                "order": asdict(self.order),
                "checksum": self.checksum,
                "notes": self.reader.notes,
                "plan": plan_to_state(self.measurer.plan),
                "seconds": self.seconds,
            }
        )

    def resume(self) -> None:
        """Continue from the newest state that every process has, if there is one."""
        if self.file.path is None:
            return
        group, rank = self.processes, self.processes.rank

        def checksum() -> int:
            return content_checksum(self.source, self.reader, rank, group.size)

        self.checksum = group.run_everywhere(checksum)[rank]
        state = self.file.newest(group)
        if state is not None:
            ordered, repeatable = self.source.ordered, self.source.repeatable
            stored, again = state["checksum"], checksum if repeatable else None
            group.run_everywhere(lambda: check_content(stored, self.checksum, again, ordered))
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.position = Position(**state["position"])
        self.pilot = Pilot(**state["pilot"])
        self.sums = self.sums.with_tensors(state["sums"])
        self.expected = ExpectedScores.from_state(state["expected"])
        self.order = LabelOrder(**state["order"])
        self.reader.notes[:] = state["notes"]
        self.measurer.plan = plan_from_state(state["plan"])
        self.earlier_seconds = state["seconds"]
