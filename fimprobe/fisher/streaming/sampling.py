"""Inputs drawn in proportion to τ = tr I(h): those that carry F, weighted back.

See docs/theory.md, "Inputs drawn in proportion to τ".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.batches import IndexedSource, NumberedBatch
from fimprobe.fisher.sums.indexed_draws import indexed_uniforms
from fimprobe.fisher.sums.measurer import DEFAULT_LABELS, Measurer
from fimprobe.measurement.arguments import MAX_AUTO_PASSES
from fimprobe.model.batch import Batch
from fimprobe.statistics import MomentsBatch

PILOT_INPUTS = 64
"""Number of inputs after which is decided how the others are chosen."""

INPUT_COST, LABEL_COST = 3.0, 1.5
"""Cost of an input and of each of its labels, in forward passes. That of an input includes its sums,
which the labels mostly share; that of a label is its backward pass to the outputs of the layers."""

GAIN = 0.8
"""Largest ratio of costs at which drawing inputs pays: the estimate of the costs is rough."""

ROUND_BATCHES = 16
"""Batches of each process that are drawn together."""

MAX_REPEATS = 4
"""Number of draws at which sampling ends, in sizes of the data set."""

_INPUT_STREAM = 0x2545F491
"""The random seed is combined with it by exclusive or, for the stream that chooses inputs."""

LABEL_STREAM = 2**40
"""Number of the first draw: labels of drawn inputs are independent of those of the pilot."""


def choose_passes(
    measurer: Measurer, batch: Batch, draws: int | str, *, drawn_inputs: bool
) -> tuple[int, bool]:
    """Return backward passes per input, and whether they are exact labels.

    Args:
        measurer: For the number of passes of exact labels.
        batch: The first batch.
        draws: The option: labels per input, "exact" or "auto".
        drawn_inputs: Whether inputs are drawn in proportion to τ.
    """
    exact = measurer.count_passes(batch)
    if draws == "exact":
        return exact, True
    if draws != "auto":
        return int(draws), False
    if drawn_inputs:  # other inputs are of more use than further labels
        return 1, False
    return (exact, True) if exact <= MAX_AUTO_PASSES else (DEFAULT_LABELS, False)


@dataclass(kw_only=True)
class Pilot:
    """Sums over the first inputs, by which drawing inputs in proportion to τ is decided.

    Attributes:
        inputs: Number of inputs.
        expected: Σ τ_b.
        square: Σ Q_b with the labels of the pilot, Q_b = Σ_i a_bi².
        single: Σ (Q_b with a single label) / τ_b.
        label: Σ of the label variance in ``square``.
        decided: Whether the decision was made.
    """

    inputs: float = 0.0
    expected: float = 0.0
    square: float = 0.0
    single: float = 0.0
    label: float = 0.0
    decided: bool = False

    def add(self, moments: MomentsBatch, expected: Tensor) -> None:
        """Add a batch.

        Args:
            moments: Its moments.
            expected: τ of its inputs [B].
        """
        powers = torch.stack([m.powers.double().cpu() for m in moments.parameters.values()]).sum(0)
        draws = moments.draws or 1
        square = powers[1] / draws**2
        label = torch.zeros_like(square)
        if draws > 1:
            label = (powers[2] - powers[1] / draws) / (draws * (draws - 1))
        known = expected > 0
        self.inputs += len(expected)
        self.expected += float(expected.sum())
        self.square += float(square.sum())
        self.label += float(label.sum())
        single = square + (draws - 1) * label
        self.single += float((single[known] / expected[known]).sum())

    def merged(self, processes: ProcessGroup) -> Pilot:
        """Return the sums of all processes."""
        names = ("inputs", "expected", "square", "single", "label")
        sums = torch.tensor([getattr(self, n) for n in names], dtype=torch.float64)
        processes.add_tensors([sums])
        return Pilot(**dict(zip(names, sums.tolist(), strict=True)))

    def pays(self, norm_square: float, target: float, size: int, labels: int) -> bool:
        """Return whether a pass of forwards over the data and draws of inputs cost less.

        Args:
            norm_square: ‖diag F‖², without noise.
            target: The relative error.
            size: Number of inputs of the data set.
            labels: Labels per input without draws of inputs.
        """
        if norm_square <= 0 or self.inputs == 0:
            return False
        allowed = target**2 * norm_square
        variance = self.square / self.inputs - norm_square
        # of inputs that are seen only the error of labels remains
        uniform = variance / (allowed + max(variance - self.label / self.inputs, 0) / size)
        if uniform > size:  # the error of labels alone is larger
            uniform = math.inf
        drawn = max(self.expected * self.single / self.inputs**2 - norm_square, 0) / allowed
        remaining = max(uniform - self.inputs, 0) * (INPUT_COST + LABEL_COST * labels)
        cost = size + drawn * (INPUT_COST + LABEL_COST)
        return drawn < MAX_REPEATS * size and cost < GAIN * remaining


@dataclass(kw_only=True)
class TraceSampler:
    """Draws of inputs with replacement, each in proportion to its τ.

    Attributes:
        expected: τ of every input of the data set [N].
        seed: The random seed.
    """

    expected: Tensor
    seed: int
    _cumulative: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Add up τ.

        Raises:
            FimprobeError: If no input has a label that is not certain.
        """
        self._cumulative = self.expected.cumsum(0)
        if not float(self._cumulative[-1]) > 0:
            raise FimprobeError(
                "`model` must leave some label uncertain, but its outputs are certain for every "
                "input to rounding: F is zero. Measure it before it is trained to certainty."
            )

    @property
    def mean(self) -> float:
        """τ̄."""
        return float(self._cumulative[-1]) / len(self.expected)

    def draw(self, numbers: Tensor) -> Tensor:
        """Return the input of each numbered draw."""
        u = indexed_uniforms(self.seed ^ _INPUT_STREAM, numbers, (1,)).view(-1)
        target = u * self._cumulative[-1]
        chosen = torch.searchsorted(self._cumulative, target, right=True)
        # rounding may pass the last input with mass
        return chosen.clamp(max=int((self._cumulative < self._cumulative[-1]).sum()))

    def batches(
        self, source: IndexedSource, rank: int, processes: int, skip: int
    ) -> Iterator[NumberedBatch]:
        """Yield this process's batches of drawn inputs, numbered by draw.

        Args:
            source: The data.
            rank: Number of this process.
            processes: Number of processes.
            skip: Number of this process's batches to leave out.
        """
        width = source.batch_size * processes * ROUND_BATCHES
        first, left_out = skip // ROUND_BATCHES, skip % ROUND_BATCHES
        for number in range(first, -(-MAX_REPEATS * len(self.expected) // width) + 1):
            draws = torch.arange(number * width, (number + 1) * width)
            own = list(draws.split(source.batch_size))[rank::processes][left_out:]
            loaded = source.at(self.draw(draws), rank, processes, left_out)
            for part, batch in zip(own, loaded, strict=True):
                yield NumberedBatch(raw=batch.raw, indices=part + LABEL_STREAM)
            left_out = 0
