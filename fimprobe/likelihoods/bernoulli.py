"""Sigmoid outputs: multi-label classification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.likelihoods.independent import Independent, precise


@dataclass(frozen=True)
class Bernoulli(Independent):
    """p(y = 1 | h) = p = sigmoid(h) for each output component.

    h is the natural parameter and t(y) = y. The score is y − p, with variance p(1−p) and fourth
    moment p(1−p)(p³ + (1−p)³). Outputs and labels have the shape [B, ...]; labels are 0 or 1.

    >>> Bernoulli().variance(torch.zeros(1, 1)).item()
    0.25
    """

    name: str = "bernoulli"
    support = "0 or 1 (not probabilities)"

    def in_support(self, labels: Tensor) -> Tensor:
        """Return where a label is 0 or 1."""
        return (labels == 0) | (labels == 1)

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return 1 where the uniform exceeds P(y = 0) = sigmoid(−h), else 0.

        Args:
            outputs: h, logits [B, ...].
            uniforms: In (0, 1), float64 [B, ...].

        Returns:
            Labels [B, ...], 0 or 1, in at least float32.
        """
        return (uniforms > torch.sigmoid(-outputs.double())).to(precise(outputs).dtype)

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return 1 where the uniform exceeds p = sigmoid(h), else 0: labels from q(1) = 1 − p.

        Args:
            outputs: h, logits [B, ...].
            uniforms: In (0, 1), float64 [B, ...].

        Returns:
            Labels [B, ...], 0 or 1, float64.
        """
        return (uniforms > torch.sigmoid(outputs.double())).double()

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return y − p, as sigmoid(−h) for y = 1 and −sigmoid(h) for y = 0, without cancellation.

        Args:
            outputs: h, logits [B, ...].
            labels: y, 0 or 1, of the outputs' shape.

        Returns:
            The score [B, ...], in at least float32.
        """
        h = precise(outputs)
        return torch.where(labels > 0.5, torch.sigmoid(-h), -torch.sigmoid(h))

    def variance(self, outputs: Tensor) -> Tensor:
        """Return p(1−p)."""
        h = precise(outputs)
        return torch.sigmoid(h) * torch.sigmoid(-h)

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return pq(p³ + q³) with q = 1 − p."""
        h = precise(outputs)
        p, q = torch.sigmoid(h), torch.sigmoid(-h)
        return p * q * (p.pow(3) + q.pow(3))
