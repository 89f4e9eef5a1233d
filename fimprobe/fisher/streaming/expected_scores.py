"""τ = tr I(h) of every input of a data set, measured by forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.reading import InputReader
from fimprobe.fisher.streaming.rounds import Content
from fimprobe.fisher.sums.measurer import Measurer

SAME_INPUT = 0.01
"""Relative difference of two measurements of τ of one input that rounding explains in any precision.

The difference is that of the sum over a batch: a single τ near zero may be rounding alone."""


@dataclass(kw_only=True)
class ExpectedScores:
    """τ of the inputs that this process has read.

    Attributes:
        indices: Numbers of the inputs of each batch.
        values: Their τ.
    """

    indices: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, measurer: Measurer, content: Content) -> None:
        """Measure a batch.

        Args:
            measurer: Measures it.
            content: The batch.

        Raises:
            FimprobeError: If the family has no τ.
        """
        batch, mask, indices = content
        expected = measurer.expected(batch, mask)
        if expected is None or not measurer.can_draw_inputs(batch, mask):
            raise FimprobeError(
                "`input_sampling='trace'` must have a likelihood with rare labels, got "
                f"{measurer.likelihood.name!r}. Use 'auto' or 'uniform'."
            )
        self.indices.append(indices)
        self.values.append(expected)

    def total(self, size: int, processes: ProcessGroup) -> Tensor:
        """Return τ of every input of the data set [N].

        Args:
            size: N.
            processes: Each has measured a part.
        """
        total = torch.zeros(size, dtype=torch.float64)
        for indices, values in zip(self.indices, self.values, strict=True):
            total[indices] = values
        processes.add_tensors([total])
        return total

    def to_state(self) -> dict[str, Tensor]:
        """Return all as two tensors."""
        if not self.indices:
            return {"indices": torch.zeros(0, dtype=torch.int64), "values": torch.zeros(0).double()}
        return {"indices": torch.cat(self.indices), "values": torch.cat(self.values)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ExpectedScores:
        """Return what :meth:`to_state` stored."""
        return cls(indices=[state["indices"]], values=[state["values"]])


def note_varying_inputs(reader: InputReader, input_sampling: str) -> None:
    """Note that inputs differ each time they are read, or refuse to draw them.

    Args:
        reader: Keeps the note.
        input_sampling: The option.

    Raises:
        FimprobeError: If drawing was requested.
    """
    if input_sampling != "auto":
        raise FimprobeError(
            "`data` must yield the same inputs each time for input_sampling='trace', but they vary, "
            "as augmented ones do. Use input_sampling='uniform'."
        )
    reader.note("The data yield other inputs each time they are read, so that none were drawn by τ.")


def is_same_input(stored: Tensor, measured: Tensor) -> bool:
    """Return whether τ of some inputs [B] is the stored one: augmented inputs have another.

    >>> is_same_input(torch.tensor([1.0, 0.1]), torch.tensor([1.001, 0.1]))
    True
    >>> is_same_input(torch.tensor([1.0, 0.1]), torch.tensor([0.1, 1.0]))
    False
    """
    difference = (stored - measured).abs().sum()
    return bool(difference <= SAME_INPUT * torch.maximum(stored.sum(), measured.sum()))
