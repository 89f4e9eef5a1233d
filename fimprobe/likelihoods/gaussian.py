"""Mean outputs of a Gaussian with fixed variance: regression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.independent import Independent, precise


@dataclass(frozen=True)
class Gaussian(Independent):
    """Y ~ N(h, σ²) for each component, σ fixed and known; the score is (y − h)/σ².

    Training on ½·mean squared error over n components corresponds to no particular σ: give the
    residual's standard deviation, or leave 1 and read the Fisher information in units of 1/σ².
    """

    sigma: float = 1.0
    name: str = "gaussian"

    def __post_init__(self) -> None:
        """Check σ."""
        if not 0 < self.sigma < float("inf"):
            raise FimprobeError(f"sigma={self.sigma!r} is no standard deviation; pass a number > 0")

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """H + σ Φ⁻¹(u)."""
        return precise(outputs).double() + self.sigma * torch.special.ndtri(uniforms)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(y − h)/σ²."""
        h = precise(outputs)
        return ((labels - h.double()) / self.sigma**2).to(h.dtype)

    def variance(self, outputs: Tensor) -> Tensor:
        """1/σ²."""
        return torch.full_like(precise(outputs), self.sigma**-2)

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """3/σ⁴."""
        return torch.full_like(precise(outputs), 3 * self.sigma**-4)
