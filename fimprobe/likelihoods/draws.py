"""Draws of labels: their number, their method, and the uniform variates behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError

MAX_VARIATES = 2**30
"""Random numbers of one measurement, 8 GB in float64; more is refused before it is allocated."""


@dataclass(kw_only=True)
class Draws:
    """The draws of labels for one batch.

    The variates are made once for the whole batch. Chunks, engine, device and number of processes
    therefore change no label.

    Attributes:
        count: Labels per input; None for exact expectations.
        seed: Random seed.
        first: Index of this process's first sample in a batch that processes share.
        total: Number of samples of that batch; None if it is not shared.
        uniforms: Variates in (0, 1), float64 [B, count, ...]; made when first needed.
        size_biased: Whether labels with a large score are drawn more often and weighted back to the
            model (:mod:`fimprobe.likelihoods.size_biased`), for families that support it.
        positions: Variates in (0, 1), float64 [B, count], which select the size-biased label.
    """

    count: int | None
    seed: int
    first: int = 0
    total: int | None = None
    uniforms: Tensor | None = None
    size_biased: bool = False
    positions: Tensor | None = None

    def uniforms_for(self, rows: slice, size: int, label_shape: torch.Size) -> Tensor:
        """Return the variates of some rows of the batch.

        Args:
            rows: Rows of the batch.
            size: Number of samples of the batch in this process.
            label_shape: Shape of the labels of those rows, batch first.

        Returns:
            In (0, 1), float64 [rows, count, ...].
        """
        assert self.count is not None
        if self.uniforms is None:
            self.uniforms = self._uniforms(self.seed, size, label_shape[1:])
        return self.uniforms[rows]

    def positions_for(self, rows: slice, size: int) -> Tensor:
        """Return the variates that select the size-biased label of an input.

        Args:
            rows: Rows of the batch.
            size: Number of samples of the batch in this process.

        Returns:
            In (0, 1), float64 [rows, count].
        """
        if self.positions is None:
            # a stream of random numbers that leaves the labels of plain draws as they are
            self.positions = self._uniforms(self.seed ^ _POSITION_STREAM, size, torch.Size())
        return self.positions[rows]

    def _uniforms(self, seed: int, size: int, label_shape: torch.Size) -> Tensor:
        assert self.count is not None
        generator = torch.Generator().manual_seed(seed)
        shape = (self.total or size, self.count, *label_shape)
        if math.prod(shape) > MAX_VARIATES:
            raise FimprobeError(
                f"`draws` must be smaller for this batch, got {self.count} for {shape[0]} samples "
                f"with {math.prod(label_shape)} labels each: more than {MAX_VARIATES} random "
                "numbers. Use fewer draws, or 'exact'."
            )
        # rand is a multiple of 2^-53 in [0, 1): half a step more keeps it inside (0, 1)
        variates = torch.rand(shape, generator=generator, dtype=torch.float64).add_(2.0**-54)
        return variates.clamp_(max=1 - 2.0**-53)[self.first : self.first + size]


_POSITION_STREAM = 0x5BD1E995
"""The random seed is combined with it by exclusive or, for the stream of the positions."""
