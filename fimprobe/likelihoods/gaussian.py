"""Mean outputs of a Gaussian with fixed variance: regression."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.independent import Independent, precise


@dataclass(frozen=True)
class Gaussian(Independent):
    """y ~ N(h, σ²) for each output component, with fixed σ.

    The score is (y − h)/σ², with variance 1/σ² and fourth moment 3/σ⁴. Outputs and labels have the
    shape [B, ...] and the unit of σ. The mean squared error implies no particular σ: pass the
    standard deviation of the residuals, or keep 1 and read the Fisher information in units of 1/σ².

    Args:
        sigma: σ, positive and finite.
        name: The name in messages and reports.

    Raises:
        FimprobeError: If σ is not a standard deviation.

    >>> Gaussian(sigma=0.5).variance(torch.zeros(1, 1)).item()
    4.0
    """

    sigma: float = 1.0
    name: str = "gaussian"

    def __post_init__(self) -> None:
        """Check that σ is positive and finite."""
        is_number = isinstance(self.sigma, Real) and not isinstance(self.sigma, bool)
        if not is_number or not 0 < self.sigma < float("inf"):
            raise FimprobeError(
                f"sigma must be a positive and finite standard deviation, got {self.sigma!r}. Pass "
                "that of the residuals, as in Gaussian(sigma=0.5)."
            )

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return h + σ Φ⁻¹(u).

        Args:
            outputs: h, in the unit of σ, [B, ...].
            uniforms: In (0, 1), float64 [B, ...].

        Returns:
            Labels [B, ...] in the unit of σ, float64.
        """
        return precise(outputs).double() + self.sigma * torch.special.ndtri(uniforms)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return (y − h)/σ².

        Args:
            outputs: h, in the unit of σ, [B, ...].
            labels: y, in the unit of σ, of the outputs' shape.

        Returns:
            The score [B, ...] in the unit of 1/σ, in at least float32.
        """
        h = precise(outputs)
        return ((labels - h.double()) / self.sigma**2).to(h.dtype)

    def variance(self, outputs: Tensor) -> Tensor:
        """Return 1/σ²."""
        return torch.full_like(precise(outputs), self.sigma**-2)

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return 3/σ⁴."""
        return torch.full_like(precise(outputs), 3 * self.sigma**-4)
