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
        return ((labels - h.double()) / _power(self.sigma, 2)).to(h.dtype)

    def variance(self, outputs: Tensor) -> Tensor:
        """Return 1/σ²."""
        return _fill_like(outputs, _power(self.sigma, -2))

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return 3/σ⁴."""
        return _fill_like(outputs, 3 * _power(self.sigma, -4))


def _power(sigma: float, exponent: int) -> float:
    """Return a power of σ, infinite where it leaves float64's range.

    >>> _power(0.5, -2), _power(1e-100, -4)
    (4.0, inf)
    """
    try:
        return float(sigma) ** exponent
    except OverflowError:
        return float("inf")


def _fill_like(outputs: Tensor, value: float) -> Tensor:
    """Return one value for each output, in at least float32.

    Args:
        outputs: h [B, ...].
        value: The value.

    Returns:
        The values [B, ...]; infinite where the value leaves the outputs' range, which torch's
        ``full_like`` refuses by an error of its own.
    """
    h = precise(outputs)
    return torch.full_like(h, value, dtype=torch.float64).to(h.dtype)
