"""Log-rate outputs: counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.likelihoods.independent import Independent, precise

LARGEST_LOG_RATE = 27.0
"""Size-biased labels of larger rates, 5e11, are drawn from the model."""

Cumulated = Callable[[Tensor, Tensor], Tensor]
"""P(Y ≤ k) at whole numbers k and rates λ."""


@dataclass(frozen=True)
class Poisson(Independent):
    """Y ~ Poisson(exp h) for each component; the score is y − exp(h)."""

    name: str = "poisson"
    support = "whole numbers from 0 (not rates or log-rates)"

    def in_support(self, labels: Tensor) -> Tensor:
        """Whole numbers from 0."""
        return torch.isfinite(labels) & (labels >= 0) & (labels == labels.double().floor())

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """The smallest k with P(Y ≤ k) ≥ u, by bisection on the regularised gamma function."""
        return _bisect(outputs, uniforms, lambda k, rate: torch.special.gammaincc(k + 1, rate))

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """The same for q(y) = p(y)(y − λ)²/λ, whose distribution function is closed.

        (y − λ)² = y(y−1) + (1−2λ)y + λ² and y p(y) = λ p(y−1) give Q(k) = P(k−1) + (λ−k) p(k).
        """

        def cumulated(k: Tensor, rate: Tensor) -> Tensor:
            below = torch.where(k > 0, torch.special.gammaincc(k.clamp(min=1), rate), 0.0)
            own = torch.exp(torch.special.xlogy(k, rate) - rate - torch.lgamma(k + 1))
            return below + (rate - k) * own

        return _bisect(outputs, uniforms, cumulated)

    def cut_off(self, outputs: Tensor) -> Tensor | None:
        """Rates at which sums of float64 no longer tell labels apart; they have no rare labels."""
        large = outputs.double() > LARGEST_LOG_RATE
        return large if bool(large.any()) else None

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Y − λ."""
        h = precise(outputs)
        return (labels - h.double().exp()).to(h.dtype)

    def variance(self, outputs: Tensor) -> Tensor:
        """λ."""
        return precise(outputs).exp()

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """λ + 3λ²."""
        rate = precise(outputs).exp()
        return rate + 3 * rate.square()


def _bisect(outputs: Tensor, uniforms: Tensor, cumulated: Cumulated) -> Tensor:
    """The smallest whole number from 0 at which the distribution function reaches the uniform."""
    rate = precise(outputs).double().exp().clamp(max=2.0**52).expand(uniforms.shape)
    low = torch.full_like(rate, -1.0)  # below the uniform; at ``high`` it is reached
    high = torch.ceil(rate + 12 * rate.sqrt() + 40)
    while bool((high - low > 1).any()):
        middle = torch.floor((low + high) / 2)
        enough = cumulated(middle, rate) >= uniforms
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high
