"""How far off an estimator is with N inputs and S labels each, and how well that is known.

For the diagonal of an estimator whose draw of one (input, label) pair is g∘g:
M₄ = Σ_i E_x E_y g_i⁴, E₂ = Σ_i E_x F_i(x)², U = ‖diag F‖². Then V_y = M₄ − E₂, V_x = E₂ − U, and the
squared relative error with N inputs and S labels is (V_x + V_y/S)/(N U).
Source: Soen & Sun (2024) for the split; docs/theory.md, "Two questions, two numbers".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Relative variances so little below zero are zero: float32's sums are no better."""


@dataclass(frozen=True, kw_only=True)
class PairVariance:
    """Mean squares of one group of parameters, and their covariance over the inputs."""

    fourth: float
    """M₄."""
    square: float | None
    """E₂; None where one label for each input does not tell it from the labels' variance."""
    norm_square: float
    """U, debiased: it may be below 0 where noise is all there is."""
    covariance: tuple[tuple[float, ...], ...]
    """Of the three, as means over the inputs; NaN for a single input."""

    def is_finite(self) -> bool:
        """Whether the three moments are; their covariance may be NaN, of a single input."""
        return all(math.isfinite(x) for x in (self.fourth, self.square or 0.0, self.norm_square))

    def relative(self, labels: int | None = 1) -> tuple[float, float] | None:
        """(V_x + V_y/S)/U for S ``labels`` (None: exact), and its standard error.

        None where it cannot be told: U is not above 0, or S > 1 and E₂ is not known.
        """
        share = 0.0 if labels is None else 1 / labels
        if self.norm_square <= 0 or (self.square is None and share != 1):
            return None
        second = share * self.fourth + (1 - share) * (self.square or 0.0)
        value = second / self.norm_square - 1
        if -ROUNDING < value < 0:
            value = 0.0
        # the gradient of the quotient, times the covariance from both sides
        a, b, c = share, 1 - share, -second / self.norm_square
        (aa, ab, ac), (_, bb, bc), (_, _, cc) = self.covariance
        variance = a * a * aa + c * c * cc + 2 * a * c * ac
        if b != 0:  # else E₂ may not be known
            variance += b * b * bb + 2 * b * (a * ab + c * bc)
        return value, max(variance, 0.0) ** 0.5 / self.norm_square


def pair_variances(
    fourth: Tensor, square: Tensor | None, trace: Tensor, norm_square: Tensor
) -> list[PairVariance]:
    """The record of every group.

    Args:
        fourth: Σ_i E_y g_i⁴ of each input [G, B], unbiased.
        square: Σ_i F_i(x)² of each input [G, B], unbiased; None where it is not known.
        trace: Σ_i F_i(x) of each input [G, B]. ``norm_square`` is no mean over inputs: an input moves
            it by 2⟨F(x), F⟩, of which 2U times its share of the trace is taken.
        norm_square: U [G].
    """
    mean = trace.mean(-1, keepdim=True)
    share = torch.where(mean > 0, trace / mean.where(mean > 0, 1), 0)
    moved = 2 * norm_square.unsqueeze(-1) * share
    rows = torch.stack([fourth, torch.zeros_like(fourth) if square is None else square, moved], 1)
    size = rows.shape[-1]
    centred = rows - rows.mean(-1, keepdim=True)
    covariance = (
        centred @ centred.mT / (size - 1) / size if size > 1 else centred @ centred.mT * torch.nan
    )
    means = rows.mean(-1).tolist()
    return [
        PairVariance(
            fourth=of[0],
            square=None if square is None else of[1],
            norm_square=norm,
            covariance=tuple(map(tuple, matrix)),
        )
        for of, norm, matrix in zip(means, norm_square.tolist(), covariance.tolist(), strict=True)
    ]
