"""Log-rate outputs: counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.likelihoods.independent import Independent, precise


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
        rate = precise(outputs).double().exp().clamp(max=2.0**52).expand(uniforms.shape)
        low = torch.full_like(rate, -1.0)  # P(Y ≤ low) < u ≤ P(Y ≤ high)
        high = torch.ceil(rate + 12 * rate.sqrt() + 40)
        while bool((high - low > 1).any()):
            middle = torch.floor((low + high) / 2)
            enough = torch.special.gammaincc(middle + 1, rate) >= uniforms
            high = torch.where(enough, middle, high)
            low = torch.where(enough, low, middle)
        return high

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
