"""Labels drawn where their score is large, and weighted back to the model's distribution.

As a model grows confident, F = E_p δδᵀ lives in labels that draws from p almost never show. Labels
drawn from q(y) = p(y)‖δ_y‖²/τ, τ = E_p‖δ‖² = tr I(h), of weight w = p/q = τ/‖δ_y‖², have
E_q[w f(y)] = E_p f(y) for every f that vanishes where δ does, as all moments of scores do; and the
score √w δ always has the length √τ: no label is rare.

An input with several independent labels (tokens, pixels, components) has δ = (δ_1, ..., δ_T) and
τ = Σ τ_t. q(y) = p(y)‖δ(y)‖²/τ is then a mixture: one position, picked with probability τ_t/τ, has
its label drawn from q_t, the others from p; the weight is again τ/‖δ(y)‖².

Derivation: docs/theory.md, "Size-biased draws".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.gaussian import Gaussian
from fimprobe.likelihoods.independent import Independent


class SizeBiasedScores(NamedTuple):
    """Scores √w δ of size-biased labels, shaped like the outputs; 1/w, ‖√w δ‖² and τ, float64 [B].

    ‖√w δ‖² is τ but for an input whose family cannot draw so: it has a label from the model, w = 1.
    """

    scores: Tensor
    inverse_weights: Tensor
    square: Tensor
    expected: Tensor


SMALLEST = 1e-300
"""A τ below has no weights in float64's range: nothing of F is left there."""


def has_size_biased_draws(likelihood: Likelihood, outputs: Tensor) -> bool:
    """Whether the family can draw where the score is large; a Gaussian has no rare labels."""
    draw = getattr(likelihood, "size_biased_quantile", None)
    if draw is None or isinstance(likelihood, Gaussian) or outputs.numel() == 0:
        return False
    if not _belongs(type(likelihood)):
        return False
    if hasattr(likelihood, "size_biased_sampler"):
        return True
    some = outputs[:1]
    shape = likelihood.label_shape(some)
    middle = torch.full(shape, 0.5, dtype=torch.float64, device=outputs.device)
    return draw(some, middle) is not None


def _belongs(family: type) -> bool:
    """Whether the draws are those of this family, and not of a parent that it departs from."""
    place = {n: i for i, c in reversed([*enumerate(family.__mro__)]) for n in vars(c)}
    name = "size_biased_quantile"
    if "size_biased_sampler" in place:
        name = "size_biased_sampler"
    elif family.__mro__[place[name]] is Independent:  # made of the family's own probabilities
        name = "probabilities"
    changed = min(place.get(n, len(family.__mro__)) for n in ("score", "variance", "quantile"))
    return place[name] <= changed


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
    return make_sampler(likelihood, outputs, mask).draw(uniforms, positions)


def make_sampler(
    likelihood: Likelihood, outputs: Tensor, mask: Tensor | None = None
) -> SizeBiasedSampler:
    """What all draws for the same outputs share; a family may bring its own."""
    make = getattr(likelihood, "size_biased_sampler", SizeBiasedSampler.of(likelihood))
    sampler: SizeBiasedSampler = make(outputs, mask)
    return sampler


class SizeBiasedSampler:
    """Draws labels for outputs h [B, ...] of T labels each, from the methods of any family."""

    def __init__(self, family: Any, outputs: Tensor, expected: Tensor, mask: Tensor | None) -> None:
        self.family, self.outputs, self.mask = family, outputs, mask
        self.size, self.shape = len(outputs), expected.shape
        if mask is not None:
            expected = expected * mask
        self.expected = expected.reshape(self.size, -1)
        self.total = self.expected.sum(1)
        self.refused = _refused(family, outputs, mask)

    @classmethod
    def of(cls, family: Any) -> Callable[[Tensor, Tensor | None], SizeBiasedSampler]:
        """Its constructor for a family, from outputs and mask."""

        def make(outputs: Tensor, mask: Tensor | None) -> SizeBiasedSampler:
            h = outputs.double()
            return cls(family, h, family.expected_squared_score(h), mask)

        return make

    def draw(self, uniforms: Tensor, positions: Tensor) -> SizeBiasedScores:
        """One label of each input, at uniforms [B, ...] and positions [B] in (0, 1)."""
        if self.expected.shape[1] == 1:
            labels = self.family.size_biased_quantile(self.outputs, uniforms)
        else:
            labels = self.plain_labels(uniforms)
            chosen = self._choose(positions)
            rows = torch.arange(self.size, device=labels.device)
            flat = labels.reshape(self.size, -1)
            u = uniforms.reshape(self.size, -1)[rows, chosen]
            one = _single_position(self.family, self.outputs, chosen)
            u = u.view(self.family.label_shape(one))
            drawn = self.family.size_biased_quantile(one, u)
            flat[rows, chosen] = drawn.reshape(-1).to(flat.dtype)
            labels = flat.view(labels.shape)
        if self.refused is not None:  # a mixture needs all positions of an input
            some = self.refused.view(-1, *[1] * (labels.dim() - 1))
            labels = torch.where(some, self.plain_labels(uniforms).to(labels.dtype), labels)
        scores, square = self.scores_of(labels)
        total = self.total
        known = (total > SMALLEST) & (square > 0) & total.isfinite()
        inverse = torch.where(known, square / total.where(known, 1), 0)
        root = torch.where(known, (total / square.where(known, 1)).sqrt(), 0)
        length = total
        if self.refused is not None:
            inverse, root = inverse.masked_fill(self.refused, 1), root.masked_fill(self.refused, 1)
            length = torch.where(self.refused, square, total)
        scores *= root.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1))
        return SizeBiasedScores(scores, inverse, length, total)

    def plain_labels(self, uniforms: Tensor) -> Tensor:
        """Labels from the model."""
        labels: Tensor = self.family.quantile(self.outputs, uniforms)
        return labels

    def scores_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """δ, zero where the mask is False, in memory of its own, and ‖δ‖² of each input."""
        scores = self.family.score(self.outputs, labels)
        if self.mask is not None:
            whole = self.mask.dim() == scores.dim()
            keep = self.mask if whole else self.mask.unsqueeze(self.family.class_dim)
            scores = scores.masked_fill(~keep, 0)
        return scores, scores.reshape(self.size, -1).square().sum(1)

    def _choose(self, positions: Tensor) -> Tensor:
        """Of each input a label, in proportion to its part of τ."""
        edges = self.expected.cumsum(1)
        target = positions.unsqueeze(1) * edges[:, -1:]
        # the last positions may be masked, of no mass: none of them is picked
        chosen = torch.searchsorted(edges, target, right=True)
        return torch.minimum(chosen, (edges < edges[:, -1:]).sum(1, keepdim=True)).squeeze(1)


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


def _refused(family: Any, h: Tensor, mask: Tensor | None) -> Tensor | None:
    """Inputs [B] of which a label cannot be drawn where its score is large; None: of none."""
    tell = getattr(family, "cut_off", None)
    cut = None if tell is None else tell(h)
    if cut is None:
        return None
    if mask is not None:
        cut = cut & mask
    refused: Tensor = cut.reshape(len(h), -1).any(1)
    return refused


def _single_position(family: Any, h: Tensor, chosen: Tensor) -> Tensor:
    """The outputs [B, 1, ...] of one position of each input, with the classes where they were."""
    axis = getattr(family, "class_dim", None)
    rows = torch.arange(len(h), device=h.device)
    if axis is None:
        return h.reshape(len(h), -1)[rows, chosen].view(-1, *[1] * (h.dim() - 1))
    last = h.movedim(axis, -1)
    one = last.reshape(len(h), -1, last.shape[-1])[rows, chosen]
    return one.view(len(h), *[1] * (h.dim() - 2), -1).movedim(-1, axis)
