"""A custom likelihood: negative binomial counts, measured on the pixels of scikit-learn's digits.

Run: python examples/own_family.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fimprobe
from fimprobe.likelihoods import Independent


@dataclass(frozen=True)
class NegativeBinomial(Independent):
    """Counts with variance μ + μ²/r for each component; the outputs are a = log μ."""

    r: float = 2.0
    name: str = "negative binomial"

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the smallest k with P(Y ≤ k) ≥ u from the sum of the probabilities."""
        mean = outputs.double().exp().expand(uniforms.shape)
        ratio = mean / (self.r + mean)
        term = (-self.r * torch.log1p(mean / self.r)).exp()  # P(Y = 0)
        cumulated, count = term.clone(), torch.zeros_like(term)
        for k in range(1, 100_000):
            below = (cumulated < uniforms) & (term > 1e-18)
            if not bool(below.any()):
                break
            term = torch.where(below, term * ratio * (self.r + k - 1) / k, term)
            cumulated = torch.where(below, cumulated + term, cumulated)
            count = torch.where(below, count + 1, count)
        return count

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return P(Y = k) of the counts k below 512, which size-biased labels need."""
        k = torch.arange(512, dtype=torch.float64, device=outputs.device)
        mean = outputs.double().exp().unsqueeze(-1)
        r = torch.full_like(mean, self.r)
        ways = torch.lgamma(k + r) - torch.lgamma(r) - torch.lgamma(k + 1)
        return (ways - r * torch.log1p(mean / r) + k * (mean / (r + mean)).log()).exp()

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return (y − μ) r/(r + μ)."""
        mean = outputs.double().exp()
        score = (labels - mean) * self.r / (self.r + mean)
        return score.to(outputs.dtype if outputs.dtype == torch.float64 else torch.float32)

    def variance(self, outputs: Tensor) -> Tensor:
        """Return μr/(r + μ)."""
        mean = self._mean(outputs)
        return mean * self.r / (self.r + mean)

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return (3v² + 6v²/r + v) (r/(r + μ))⁴ with v = μ + μ²/r."""
        mean = self._mean(outputs)
        v = mean + mean.square() / self.r
        fourth = 3 * v.square() + 6 * v.square() / self.r + v
        return fourth * (self.r / (self.r + mean)).pow(4)

    def _mean(self, outputs: Tensor) -> Tensor:
        return (outputs if outputs.dtype == torch.float64 else outputs.float()).exp()


def main() -> None:
    """Predict the lower half of each digit's pixel counts (0 to 16) from the upper half."""
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().data[:64], dtype=torch.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 32))
    print(fimprobe.measure(net, pixels[:, :32] / 16, likelihood=NegativeBinomial(r=2.0), draws=4))


if __name__ == "__main__":
    main()
