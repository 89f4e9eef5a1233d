"""Sigmoid outputs: multi-label classification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.likelihoods.independent import Independent, precise


@dataclass(frozen=True)
class Bernoulli(Independent):
    """p(y = 1 | h) = sigmoid(h) for each component; the score is y − sigmoid(h)."""

    name: str = "bernoulli"
    support = "labels 0 and 1 (not probabilities)"

    def in_support(self, labels: Tensor) -> Tensor:
        """0 and 1."""
        return (labels == 0) | (labels == 1)

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """1 where the uniform exceeds P(y = 0) = sigmoid(−h)."""
        return (uniforms > torch.sigmoid(-outputs.double())).to(precise(outputs).dtype)

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """1 with probability 1 − p: each label is drawn as often as the other one should be."""
        return (uniforms > torch.sigmoid(outputs.double())).double()

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Y − p, as sigmoid(−h) for y = 1 and −sigmoid(h) for y = 0: no cancellation."""
        h = precise(outputs)
        return torch.where(labels > 0.5, torch.sigmoid(-h), -torch.sigmoid(h))

    def variance(self, outputs: Tensor) -> Tensor:
        """P(1−p)."""
        h = precise(outputs)
        return torch.sigmoid(h) * torch.sigmoid(-h)

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Pq(p³ + q³)."""
        h = precise(outputs)
        p, q = torch.sigmoid(h), torch.sigmoid(-h)
        return p * q * (p.pow(3) + q.pow(3))
