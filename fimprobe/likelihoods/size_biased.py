"""Labels drawn where their score is large, and weighted back to the model's distribution.

As a model grows confident, F = E_p δδᵀ lives in labels that draws from p almost never show. Labels
drawn from q(y) = p(y)‖δ_y‖²/τ, τ = E_p‖δ‖² = tr I(h), of weight w = p/q = τ/‖δ_y‖², have
E_q[w f(y)] = E_p f(y) for every f, and the score √w δ always has the length √τ: no label is rare.

An input with several independent labels (tokens, pixels, components) has δ = (δ_1, ..., δ_T) and
τ = Σ τ_t. q(y) = p(y)‖δ(y)‖²/τ is then a mixture: one position, picked with probability τ_t/τ, has
its label drawn from q_t, the others from p; the weight is again τ/‖δ(y)‖².

Derivation: docs/theory.md, "Size-biased draws".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fimprobe.likelihoods.gaussian import Gaussian
from fimprobe.types import Likelihood


class SizeBiasedScores(NamedTuple):
    """Scores √w δ of size-biased labels, shaped like the outputs; 1/w and τ, float64 [B]."""

    scores: Tensor
    inverse_weights: Tensor
    expected: Tensor


def has_size_biased_draws(likelihood: Likelihood, outputs: Tensor) -> bool:
    """Whether the family can draw where the score is large; a Gaussian has no rare labels."""
    draw = getattr(likelihood, "size_biased_quantile", None)
    if draw is None or isinstance(likelihood, Gaussian) or outputs.numel() == 0:
        return False
    some = outputs[:1]
    shape = likelihood.label_shape(some)
    middle = torch.full(shape, 0.5, dtype=torch.float64, device=outputs.device)
    return draw(some, middle) is not None


def draw_size_biased(
    likelihood: Likelihood,
    outputs: Tensor,
    uniforms: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
) -> SizeBiasedScores:
    """One size-biased label of each input.

    Args:
        likelihood: a family for which ``has_size_biased_draws``.
        outputs: h [B, ...].
        uniforms: in (0, 1), float64, of the labels' shape [B, ...].
        positions: in (0, 1), float64 [B]: which of an input's labels is drawn from q_t.
        mask: bool, of the labels' shape; False leaves a label out.

    >>> from fimprobe.likelihoods import Bernoulli
    >>> h, u = torch.tensor([[8.0, 7.0]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    >>> draw = draw_size_biased(Bernoulli(), h, u, torch.tensor([0.9], dtype=torch.float64))
    >>> draw.scores.sign().tolist()  # the second label, the less sure one, is drawn against p
    [[1.0, -1.0]]
    """
    family: Any = likelihood
    h = outputs.double()
    size = len(h)
    expected = family.expected_squared_score(h)
    if mask is not None:
        expected = expected * mask
    each = expected.reshape(size, -1)
    total = each.sum(1)
    if each.shape[1] == 1:
        labels = family.size_biased_quantile(h, uniforms)
    else:
        edges = each.cumsum(1)
        target = positions.unsqueeze(1) * edges[:, -1:]
        # the last positions may be masked, of no mass: none of them is picked
        chosen = torch.searchsorted(edges, target, right=True)
        chosen = torch.minimum(chosen, (edges < edges[:, -1:]).sum(1, keepdim=True)).squeeze(1)
        rows = torch.arange(size, device=h.device)
        labels = family.quantile(outputs, uniforms)
        flat = labels.reshape(size, -1)
        u = uniforms.reshape(size, -1)[rows, chosen]
        one = _single_position(family, h, chosen)
        u = u.view(likelihood.label_shape(one))
        flat[rows, chosen] = family.size_biased_quantile(one, u).reshape(-1).to(flat.dtype)
        labels = flat.view(labels.shape)
    scores = family.score(h, labels)
    if mask is not None:
        keep = mask if mask.dim() == scores.dim() else mask.unsqueeze(family.class_dim)
        scores = scores.masked_fill(~keep, 0)
    square = scores.reshape(size, -1).square().sum(1)
    known = (total > 0) & (square > 0)
    inverse = torch.where(known, square / total.where(known, 1), 0)
    root = torch.where(known, (total / square.where(known, 1)).sqrt(), 0)
    return SizeBiasedScores(scores * root.view(-1, *[1] * (scores.dim() - 1)), inverse, total)


def expected_squares(
    likelihood: Likelihood, outputs: Tensor, mask: Tensor | None = None
) -> Tensor | None:
    """τ of each input [B], float64; None where the family does not tell."""
    tell = getattr(likelihood, "expected_squared_score", None)
    if tell is None:
        return None
    expected: Tensor = tell(outputs.double())
    if mask is not None:
        expected = expected * mask
    return expected.reshape(len(outputs), -1).sum(1)


def _single_position(family: Any, h: Tensor, chosen: Tensor) -> Tensor:
    """The outputs [B, 1, ...] of one position of each input, with the classes where they were."""
    axis = getattr(family, "class_dim", None)
    rows = torch.arange(len(h), device=h.device)
    if axis is None:
        return h.reshape(len(h), -1)[rows, chosen].view(-1, *[1] * (h.dim() - 1))
    last = h.movedim(axis, -1)
    one = last.reshape(len(h), -1, last.shape[-1])[rows, chosen]
    return one.view(len(h), *[1] * (h.dim() - 2), -1).movedim(-1, axis)
