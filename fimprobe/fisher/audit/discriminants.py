"""Functions of a diagonal by which candidates with random batches or labels differ most.

The entries of a candidate are correlated, because they share batches. Their covariance C follows from
the gradients of single inputs: with K batches of B inputs and S = E g gᵀ it is 2/K (S/B)∘(S/B) for
normal sums. Directions in which a candidate hardly varies separate it from the others: the linear
discriminant from expectation E to expectation D is C⁻¹(D − E). Its spread comes from simulations, so
that an approximate C costs power, not truth. See docs/theory.md, "Which computation a diagonal is".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MODEL_ERROR = 0.01
"""Relative error of every entry that is not noise: rounding, or a batch that was left out."""

JITTER = 1e-12
"""Share of the mean variance that is added for the factorisation."""


class Discriminants:
    """The discriminants of one candidate.

    Args:
        expected: Expectations by labelling at some entries, up to their scales.
        key: The candidate's labelling.
        covariance: C of the candidate, in units of its expectation [entries, entries].
    """

    def __init__(self, expected: Mapping[str, Tensor], key: str, covariance: Tensor) -> None:
        centre = expected[key]
        self.alive = (centre > 0).nonzero().view(-1)
        self.centre = centre[self.alive]
        covariance = covariance[self.alive][:, self.alive]
        covariance = covariance + torch.diag((MODEL_ERROR * self.centre).square())
        jitter = JITTER * covariance.diagonal().mean()
        self.factor = torch.linalg.cholesky(covariance + jitter * torch.eye(len(self.alive)).double())
        self.scale_of = self._solved(self.centre)
        self.scale_of = self.scale_of / (self.scale_of @ self.centre)
        directions = []
        for other, x in expected.items():
            difference = x[self.alive] / (self.scale_of @ x[self.alive]) - self.centre
            if other != key and float(difference.norm()) > MODEL_ERROR * float(self.centre.norm()):
                directions.append(self._solved(difference))
        self.directions = (
            torch.stack(directions, 1) if directions else centre.new_zeros(len(self.alive), 0)
        )

    def _solved(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x.unsqueeze(1), self.factor).squeeze(1)

    def features(self, x: Tensor) -> Tensor:
        """Return log χ² of diagonals [n, entries], and their discriminants, free of scale."""
        alive = x[:, self.alive]
        shape = alive / (alive @ self.scale_of).clamp(min=1e-300).unsqueeze(1)
        residual = torch.linalg.solve_triangular(
            self.factor, (shape - self.centre).T, upper=False
        ).square()
        chi = residual.sum(0).clamp(min=1e-300).log()
        return torch.cat([chi.unsqueeze(1), shape @ self.directions], 1)


def deviation(discriminants: Discriminants, theirs: Tensor, simulated: Tensor) -> float:
    """Return the largest deviation of a diagonal from simulations, in their standard deviations.

    Args:
        discriminants: Those of the candidate.
        theirs: The diagonal [entries].
        simulated: Simulations of the candidate [n, entries].
    """
    features = discriminants.features(simulated)
    difference = discriminants.features(theirs[None])[0] - features.mean(0)
    return float((difference.abs() / features.std(0).clamp(min=1e-9)).max())


def covariance_of_batches(rows: Tensor, size: int) -> Tensor:
    """Return C of squared sums over random batches, in units of the expectation.

    Args:
        rows: Gradients of single inputs [draws, inputs, entries].
        size: Inputs of a batch.
    """
    flat = rows.flatten(0, 1)
    moment = flat.T @ flat / len(flat)
    return 2 * size / rows.shape[1] * moment.square()
