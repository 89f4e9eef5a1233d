"""What common code computes instead of F: squares per input, and squares of the batches as given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.fisher.audit.labelled_data import Labelled, LabelledData
from fimprobe.fisher.audit.labellings import Labelling
from fimprobe.fisher.decisions import flatten
from fimprobe.fisher.sums.accumulation import FisherSums
from fimprobe.fisher.sums.errors_of_sums import SampleDesign, group_errors
from fimprobe.fisher.sums.measurer import Measurer

LARGEST_PIECE = 64
"""Inputs of a batch that are pulled back together where the data have no batches."""


@dataclass(kw_only=True)
class InputSquares:
    """Sums over inputs for one labelling, of all compared entries as one vector.

    Attributes:
        second: Mean of g² over inputs.
        mean: Mean of g.
        rel_error: √(Σ Var)/‖second‖ that inputs which were not read leave.
    """

    second: Tensor
    mean: Tensor
    rel_error: float


@dataclass(kw_only=True)
class BatchSquares:
    """Sums of squared batch-mean gradients m, of all compared entries as one vector.

    Attributes:
        plain: Σ m² over batches.
        weighted: Σ b² m², b the size of the batch.
        sizes: The sizes.
    """

    plain: Tensor
    weighted: Tensor
    sizes: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, size: int) -> BatchSquares:
        """Return empty sums for ``size`` entries."""
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(plain=zeros, weighted=zeros.clone())

    def add(self, gradient: Tensor, size: int) -> None:
        """Add a batch.

        Args:
            gradient: The sum of its per-sample gradients.
            size: Its number of inputs.
        """
        self.weighted += gradient.square()
        self.plain += (gradient / size).square()
        self.sizes.append(size)


@dataclass(kw_only=True)
class CandidateMeasurer:
    """Measures candidates on the data of an audit.

    Attributes:
        measurer: Measures batches.
        data: Batches with labels.
        names: The compared parameters.
    """

    measurer: Measurer
    data: LabelledData
    names: list[str]

    def input_squares(self, labellings: list[Labelling]) -> dict[str, InputSquares]:
        """Return the sums over inputs for each labelling, by its key."""
        parameters = self.measurer.parameters()
        compared = {name: parameters[name] for name in self.names}
        sums = {one.key: FisherSums.of(compared) for one in labellings}
        means = {one.key: self._zeros() for one in labellings}
        for content in self.data.batches():
            batch, mask, known = content
            labels = _or_zeros(known, batch.size)
            for one in labellings:
                moments = self.measurer.moments_of(batch, mask, labels, one.score)
                moments.parameters = {n: m for n, m in moments.parameters.items() if n in compared}
                sums[one.key].add(moments)
            for key, gradient in self.gradients(content, labellings).items():
                means[key] += gradient
        return {key: self._finished(sums[key], means[key]) for key in sums}

    def _finished(self, sums: FisherSums, mean: Tensor) -> InputSquares:
        size = self.data.source.size if self.data.max_inputs is not None else sums.inputs
        errors = group_errors(sums, SampleDesign(size=size))
        second = flatten({name: entry.total for name, entry in sums.entries.items()})
        rel_error = float(errors.rel_error[-1])
        return InputSquares(
            second=second / sums.inputs,
            mean=mean / sums.inputs,
            rel_error=rel_error if rel_error == rel_error else 0.0,
        )

    def given_batch_squares(self, labellings: list[Labelling]) -> dict[str, BatchSquares]:
        """Return the sums of squared gradients of the batches as given, by labelling."""
        squares = {one.key: BatchSquares.of(len(self._zeros())) for one in labellings}
        for content in self.data.given_batches():
            for key, gradient in self.gradients(content, labellings).items():
                squares[key].add(gradient, content[0].size)
        return squares

    def gradients(self, content: Labelled, labellings: list[Labelling]) -> dict[str, Tensor]:
        """Return the sums of the per-sample gradients of a batch, by labelling.

        Args:
            content: The batch, measured a piece at a time.
            labellings: The labels.
        """
        batch, mask, known = content
        labels = _or_zeros(known, batch.size)
        scores = {one.key: one.score for one in labellings}
        totals = {key: self._zeros() for key in scores}
        step = self.data.batch_size or LARGEST_PIECE
        for start in range(0, batch.size, step):
            rows = slice(start, start + step)
            piece_mask = None if mask is None else mask[rows]
            sums = self.measurer.summed_gradients(batch[rows], piece_mask, labels[rows], scores)
            for key, by_name in sums.items():
                totals[key] += flatten({name: by_name[name].double() for name in self.names})
        return totals

    def _zeros(self) -> Tensor:
        parameters = self.measurer.parameters()
        return torch.zeros(sum(parameters[n].numel() for n in self.names), dtype=torch.float64)


def _or_zeros(labels: Tensor | None, size: int) -> Tensor:
    """The labels; zeros for labellings that use none."""
    return torch.zeros(size, dtype=torch.int64) if labels is None else labels
