"""The relative error of an estimator with N inputs and S labels each, and its standard error.

The draw of one (input, label) pair estimates the diagonal by g∘g. Its moments are
M₄ = Σ_i E_x E_y g_i⁴, E₂ = Σ_i E_x F_i(x)² and U = ‖diag F‖². Then V_y = M₄ − E₂, V_x = E₂ − U, and
the squared relative error with N inputs and S labels is (V_x + V_y/S)/(N U). See Soen & Sun (2024)
for the split, and docs/theory.md, "Two questions, two numbers".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Relative variances down to this much below zero count as zero: the rounding of sums in float32."""


@dataclass(frozen=True, kw_only=True)
class PairVariance:
    """The three moments of one group of parameters, and the covariance of their estimates."""

    fourth: float
    """M₄."""
    square: float | None
    """E₂; None with one label for each input, which does not separate it from the label variance."""
    norm_square: float
    """U, debiased: it is negative where the noise is larger than the diagonal."""
    covariance: tuple[tuple[float, ...], ...]
    """Covariance of the three as means over the inputs [3, 3]; NaN for a single input."""
    effective_inputs: float = inf
    """(Σ m)²/Σ m² of the inputs' shares m of M₄, or of E₂ if that is smaller."""

    def is_finite(self) -> bool:
        """Return whether the moments are finite; for a single input the covariance is NaN."""
        square = self.square or 0.0
        return isfinite(self.fourth) and isfinite(square) and isfinite(self.norm_square)

    def relative(self, labels: int | None = 1) -> tuple[float, float] | None:
        """Return (V_x + V_y/S)/U and its standard error.

        Args:
            labels: S for each input; None for exact labels.

        Returns:
            Both; None where they are undefined: U is not positive, or S > 1 and E₂ is unknown.
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
        if b != 0:  # else E₂ may be unknown
            variance += b * b * bb + 2 * b * (a * ab + c * bc)
        return value, max(variance, 0.0) ** 0.5 / self.norm_square


def pair_variances(
    fourth: Tensor, square: Tensor | None, trace: Tensor, norm_square: Tensor
) -> list[PairVariance]:
    """Return the record of every group.

    U is not a mean over the inputs. To first order an input changes it by 2⟨F(x), F⟩, approximated
    here by 2U times the input's share of the trace.

    Args:
        fourth: Σ_i E_y g_i⁴ of each input [G, B], unbiased.
        square: Σ_i F_i(x)² of each input [G, B], unbiased; None where it is unknown.
        trace: Σ_i F_i(x) of each input [G, B].
        norm_square: U [G].

    Returns:
        G records.
    """
    mean = trace.mean(-1, keepdim=True)
    shares = torch.where(mean > 0, trace / mean.where(mean > 0, 1), 0)
    norm_change = 2 * norm_square.unsqueeze(-1) * shares
    squares = torch.zeros_like(fourth) if square is None else square
    rows = torch.stack([fourth, squares, norm_change], 1)
    size = rows.shape[-1]
    means = rows.mean(-1, keepdim=True)
    centred = rows - means
    products = centred @ centred.mT
    covariance = products / (size - 1) / size if size > 1 else products * torch.nan
    fourths, mean_squares, _ = means.squeeze(-1).T.tolist()
    matrices = [zip(*row, strict=True) for row in covariance.permute(1, 2, 0).tolist()]
    shares = rows[:, : 1 if square is None else 2].clamp(min=0)
    effective = shares.sum(-1).square() / shares.square().sum(-1)
    columns = (
        fourths,
        [None] * len(fourths) if square is None else mean_squares,
        norm_square.tolist(),
        zip(*matrices, strict=True),  # without lists in between: there are thousands
        effective.nan_to_num(inf).amin(-1).tolist(),
    )
    return [
        PairVariance(fourth=m4, square=e2, norm_square=u, covariance=c, effective_inputs=n)
        for m4, e2, u, c, n in zip(*columns, strict=True)
    ]
