"""Weights of the squares and fourth powers of gradients, one for each backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRAM_LIMIT = 16
"""Of more passes than this, only the per-sample squared norms of the Gram matrix are kept."""


@dataclass(frozen=True)
class PassWeights:
    """Weights of g² and g⁴ of each pass.

    Labels drawn from the model have weights 1, and each draw is a block. They need no record (None
    in place of it), except for ``coincidences``.

    Attributes:
        square: Weights of g² [B, S] of exact passes. None for size-biased draws: their gradients
            carry √w already.
        quartic: Weights of g⁴ [B, S]; 1/w for size-biased draws.
        block: The block of each pass. Passes of one independent random variable form a block, and
            fourth cumulants add over blocks. Each drawn label is a block.
        coincidences: For each drawn label, the number of other draws that are equal, minus its
            expectation [B, S]. None where that is not known.
        from_model: Whether labels were drawn from the model.
    """

    square: Tensor | None
    quartic: Tensor
    block: list[int]
    coincidences: Tensor | None = None
    from_model: bool = False

    @property
    def are_size_biased(self) -> bool:
        """Whether these are the weights of size-biased labels."""
        return self.square is None and not self.from_model

    def rows(self, samples: slice | Tensor) -> PassWeights:
        """Select the weights of some samples."""
        if isinstance(samples, slice) and samples == slice(0, len(self.quartic)):
            return self
        square = None if self.square is None else self.square[samples]
        coincidences = None if self.coincidences is None else self.coincidences[samples]
        return PassWeights(square, self.quartic[samples], self.block, coincidences, self.from_model)

    def padded(self, count: int) -> PassWeights:
        """Append passes of weight 0 to the last block, up to ``count`` passes in total."""
        missing = count - len(self.block)
        assert self.square is not None
        square, quartic = (
            torch.nn.functional.pad(w, (0, missing)) for w in (self.square, self.quartic)
        )
        return PassWeights(square, quartic, self.block + self.block[-1:] * missing)

    def block_slices(self) -> list[slice]:
        """Slices of the passes of each block."""
        slices, start = [], 0
        for end in range(1, len(self.block) + 1):
            if end == len(self.block) or self.block[end] != self.block[start]:
                slices.append(slice(start, end))
                start = end
        return slices
