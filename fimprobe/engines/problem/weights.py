"""Factors of squares and fourth powers of draws and exact passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRAM_LIMIT = 16
"""Above so many draws or passes only the per-sample squared norms are kept of the Gram matrix."""


@dataclass(frozen=True)
class Weights:
    """Factors of g² and g⁴ [B, S] of exact passes, and each pass's block.

    Labels that are drawn from the model have none (None in place of this record): the factors are 1
    and each draw is a block. Size-biased draws have no ``second``, as √w is in the gradients ĝ
    already; ``fourth`` is 1/w, and each draw is a block.
    """

    second: Tensor | None
    fourth: Tensor
    blocks: list[int]

    def rows(self, samples: slice | Tensor) -> Weights:
        """The weights of some samples."""
        second = None if self.second is None else self.second[samples]
        return Weights(second, self.fourth[samples], self.blocks)

    def padded(self, count: int) -> Weights:
        """With further passes of the last block that weigh nothing, ``count`` in all."""
        more = count - len(self.blocks)
        assert self.second is not None
        second, fourth = (torch.nn.functional.pad(w, (0, more)) for w in (self.second, self.fourth))
        return Weights(second, fourth, self.blocks + self.blocks[-1:] * more)

    def parts(self) -> list[slice]:
        """The passes of each block."""
        found, start = [], 0
        for end in range(1, len(self.blocks) + 1):
            if end == len(self.blocks) or self.blocks[end] != self.blocks[start]:
                found.append(slice(start, end))
                start = end
        return found
