"""Random numbers that depend on the seed and on an input's number in the data set only.

Batch sizes, the order of the batches, chunks, interruptions and processes therefore change no label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.likelihoods.draws import Draws

_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""splitmix64's increment and multipliers, as signed 64-bit integers."""

_DRAW_STRIDE = 2**32
"""Step of the counter from one label of an input to the next; an input has fewer positions."""


def indexed_uniforms(seed: int, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return independent variates in (0, 1), float64 [B, *shape].

    Args:
        seed: The random seed.
        indices: Number of each input [B], int64.
        shape: (draws, *positions); a longer sequence has the same first variates.

    >>> several = indexed_uniforms(0, torch.tensor([7, 8]), (2, 3))
    >>> single = indexed_uniforms(0, torch.tensor([8]), (2, 5))
    >>> torch.equal(several[1], single[0, :, :3])
    True
    """
    key = _mixed(torch.tensor([seed % 2**62]))
    rows = _mixed(indices.cpu().long() * _GAMMA + key)
    draws, positions = shape[0], math.prod(shape[1:])
    counter = torch.arange(draws).unsqueeze(1) * _DRAW_STRIDE + torch.arange(positions) + 1
    x = _mixed(rows.view(-1, 1, 1) + counter * _GAMMA)
    # rand is a multiple of 2^-53 in [0, 1): half a step more keeps it inside (0, 1)
    variates = ((x >> 11) & (2**53 - 1)).double() * 2.0**-53 + 2.0**-54
    return variates.clamp_(max=1 - 2.0**-53).view(len(rows), *shape)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser."""
    # torch shifts signed integers arithmetically: the masks clear the copies of the sign bit
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))


@dataclass(kw_only=True)
class IndexedDraws(Draws):
    """Draws of labels whose variates belong to numbered inputs.

    Attributes:
        indices: Number of each input of the batch [B], int64.
    """

    indices: Tensor

    def _uniforms(self, seed: int, size: int, label_shape: torch.Size) -> Tensor:
        assert self.count is not None
        return indexed_uniforms(seed, self.indices, (self.count, *label_shape))
