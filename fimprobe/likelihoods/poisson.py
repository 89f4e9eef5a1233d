"""Log-rate outputs: counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.likelihoods.independent import Independent, precise

MAX_SIZE_BIASED_LOG_RATE = 27.0
"""Labels of larger rates (5e11) are drawn from the model: float64 sums cannot separate them."""

CumulativeDistribution = Callable[[Tensor, Tensor], Tensor]
"""P(Y ≤ k) at whole numbers k and rates λ."""


@dataclass(frozen=True)
class Poisson(Independent):
    """y ~ Poisson(λ) with λ = exp(h) for each output component.

    h is the natural parameter and t(y) = y. The score is y − λ, with variance λ and fourth moment
    λ + 3λ². Outputs and labels have the shape [B, ...]; labels are counts.

    >>> Poisson().fourth_moment(torch.zeros(1, 1)).item()
    4.0
    """

    name: str = "poisson"
    support = "whole numbers from 0 (not rates or log-rates)"

    def in_support(self, labels: Tensor) -> Tensor:
        """Return where a label is a whole number from 0."""
        return torch.isfinite(labels) & (labels >= 0) & (labels == labels.double().floor())

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the smallest k with P(Y ≤ k) ≥ u, by bisection on the regularised gamma function.

        Args:
            outputs: h, log-rates [B, ...].
            uniforms: In (0, 1), float64 [B, ...].

        Returns:
            Counts [B, ...], float64.
        """
        return _bisect(outputs, uniforms, lambda k, rate: torch.special.gammaincc(k + 1, rate))

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the quantile of q(y) = p(y)(y − λ)²/λ, by bisection on its distribution function.

        (y − λ)² = y(y−1) + (1−2λ)y + λ² and y p(y) = λ p(y−1) give Q(k) = P(k−1) + (λ−k) p(k).

        Args:
            outputs: h, log-rates [B, ...].
            uniforms: In (0, 1), float64 [B, ...].

        Returns:
            Counts [B, ...], float64.
        """

        def cumulative(k: Tensor, rate: Tensor) -> Tensor:
            """Return Q(k), the distribution function of q.

            Args:
                k: Whole numbers, float64 [B, ...].
                rate: λ, of the same shape.
            """
            below = torch.where(k > 0, torch.special.gammaincc(k.clamp(min=1), rate), 0.0)
            mass = torch.exp(torch.special.xlogy(k, rate) - rate - torch.lgamma(k + 1))
            return below + (rate - k) * mass

        return _bisect(outputs, uniforms, cumulative)

    def cut_off(self, outputs: Tensor) -> Tensor | None:
        """Return where rates are too large for size-biased draws; such labels are never rare."""
        large = outputs.double() > MAX_SIZE_BIASED_LOG_RATE
        return large if bool(large.any()) else None

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return y − λ.

        Args:
            outputs: h, log-rates [B, ...].
            labels: Counts y, of the outputs' shape.

        Returns:
            The score [B, ...], in at least float32.
        """
        h = precise(outputs)
        return (labels - h.double().exp()).to(h.dtype)

    def variance(self, outputs: Tensor) -> Tensor:
        """Return λ."""
        return precise(outputs).exp()

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return λ + 3λ²."""
        rate = precise(outputs).exp()
        return rate + 3 * rate.square()


def _bisect(outputs: Tensor, uniforms: Tensor, cumulative: CumulativeDistribution) -> Tensor:
    """Return the smallest whole number from 0 at which ``cumulative`` reaches the uniform.

    Args:
        outputs: Log-rates, broadcastable to the uniforms.
        uniforms: In (0, 1), float64 [B, ...].
        cumulative: The distribution function.
    """
    rate = precise(outputs).double().exp().clamp(max=2.0**52).expand(uniforms.shape)
    low = torch.full_like(rate, -1.0)  # invariant: cumulative(low) < uniform <= cumulative(high)
    high = torch.ceil(rate + 12 * rate.sqrt() + 40)
    while bool((high - low > 1).any()):
        middle = torch.floor((low + high) / 2)
        reached = cumulative(middle, rate) >= uniforms
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    return high
