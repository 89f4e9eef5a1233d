"""How labels are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Draws:
    """How labels come about: ``count`` samples per input, or ``count=None`` for exact.

    ``uniforms`` [B, count, ...] are made once for the whole batch, so that chunking, the
    engine, the device and the number of processes change no label. Where processes share a batch,
    ``first`` is the place of this one's first sample among all ``total``. ``size_biased``: labels
    are drawn where their score is large and weighted back to the model
    (:mod:`fimprobe.likelihoods.size_biased`), for families that can.
    """

    count: int | None
    seed: int
    first: int = 0
    total: int | None = None
    uniforms: Tensor | None = None
    size_biased: bool = False
    positions: Tensor | None = None

    def uniforms_for(self, rows: slice, size: int, label_shape: torch.Size) -> Tensor:
        """The (0, 1) variates, float64 [rows, count, ...], of some rows of a batch of ``size``."""
        assert self.count is not None
        if self.uniforms is None:
            self.uniforms = self._uniforms(self.seed, size, label_shape[1:])
        return self.uniforms[rows]

    def positions_for(self, rows: slice, size: int) -> Tensor:
        """The (0, 1) variates, float64 [rows, count], that pick the label that is size-biased."""
        if self.positions is None:
            # another stream: the labels of the other positions are those of plain draws
            self.positions = self._uniforms(self.seed ^ _POSITION_STREAM, size, torch.Size())
        return self.positions[rows]

    def _uniforms(self, seed: int, size: int, label_shape: torch.Size) -> Tensor:
        assert self.count is not None
        generator = torch.Generator().manual_seed(seed)
        shape = (self.total or size, self.count, *label_shape)
        # rand is a multiple of 2^-53 in [0, 1): half a step more keeps it inside (0, 1)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64).add_(2.0**-54)
        return drawn.clamp_(max=1 - 2.0**-53)[self.first : self.first + size]


_POSITION_STREAM = 0x5BD1E995
"""Exclusive or of the seed: a stream of its own for the positions of size-biased labels."""
