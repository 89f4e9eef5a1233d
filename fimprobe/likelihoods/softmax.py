"""Probabilities of softmax outputs without cancellation near certainty, and the sizes of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Probabilities with the largest class set apart: 1 − p_max is summed from the other classes.

    Attributes:
        p: Probabilities [..., C].
        top: Index of the largest class [..., 1].
        p_max: Its probability [...].
        rest: ``p`` with 0 at the largest class [..., C].
        complement: 1 − p_max [...].
    """

    p: Tensor
    top: Tensor
    p_max: Tensor
    rest: Tensor
    complement: Tensor


def softmax(h: Tensor) -> Softmax:
    """Return the softmax of logits ``h`` [..., C], in float64 for float64 logits, else in float32."""
    p = torch.softmax(h, -1, dtype=softmax_dtype(h))
    p_max, top = p.max(-1, keepdim=True)
    rest = p.scatter(-1, top, 0.0)
    return Softmax(p=p, top=top, p_max=p_max.squeeze(-1), rest=rest, complement=rest.sum(-1))


def softmax_dtype(h: Tensor) -> torch.dtype:
    """Return the type of probabilities: at least float32."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def complements(s: Softmax) -> Tensor:
    """Return 1 − p of every class [..., C]."""
    return (1 - s.p).scatter(-1, s.top, s.complement.unsqueeze(-1))


def expected_squared_scores(s: Softmax) -> Tensor:
    """Return E‖onehot(y) − p‖² = Σ p(1 − p) [...]."""
    return (s.p * complements(s)).sum(-1)


def squared_scores(s: Softmax) -> Tensor:
    """Return ‖δ_y‖² = (1 − p_y)² + Σ_{z≠y} p_z² of every class y [..., C]."""
    squares = s.rest.square()
    rest = squares.sum(-1, keepdim=True)
    values = (1 - s.p).square() + s.p_max.square().unsqueeze(-1) + (rest - squares)
    return values.scatter(-1, s.top, s.complement.square().unsqueeze(-1) + rest)


def size_biased_weights(s: Softmax) -> Tensor:
    """Return p_y‖δ_y‖² of every class y [..., C], to which size-biased labels are proportional."""
    return s.p * squared_scores(s)


def first_class_above(cdf: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first class whose cumulative weight exceeds the uniform's share of the total.

    Args:
        cdf: Cumulative sums of the weights of the classes, float64 [..., C].
        uniforms: In (0, 1), float64 [...].
    """
    target = uniforms.unsqueeze(-1) * cdf[..., -1:]
    index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return index.clamp_(max=cdf.shape[-1] - 1)
