"""Size-biased labels: drawn in proportion to the squared score, and weighted back to the model.

As a model grows confident, F = E_p δδᵀ depends on labels that draws from p almost never show. The
labels here are drawn from q(y) = p(y)‖δ_y‖²/τ, where τ = E_p‖δ‖² = tr I(h), with the weight
w = p/q = τ/‖δ_y‖². Then E_q[w f(y)] = E_p f(y) for every f that vanishes where δ does, such as all
moments of scores. The score √w δ always has the length √τ, so no label is rare.

An input with several independent labels (tokens, pixels, components) has δ = (δ_1, ..., δ_T) and
τ = Σ τ_t. Then q(y) = p(y)‖δ(y)‖²/τ is a mixture: one position, chosen with probability τ_t/τ, has
its label drawn from q_t, all others from p. The weight is again τ/‖δ(y)‖².

Derivation: docs/theory.md, "Size-biased draws".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.gaussian import Gaussian
from fimprobe.likelihoods.independent import Independent
from fimprobe.likelihoods.output_mask import spread_mask


@dataclass(frozen=True, kw_only=True)
class SizeBiasedScores:
    """Scores of size-biased labels, one label set per input.

    Attributes:
        scores: √w δ, of the outputs' shape [B, ...].
        inverse_weights: 1/w, float64 [B].
        square: ‖√w δ‖², float64 [B]. It equals τ, except for inputs whose labels are drawn from the
            model (w = 1) because their family cannot draw otherwise.
        expected: τ, float64 [B].
        labels: The labels, of the labels' shape [B, ...].
    """

    scores: Tensor
    inverse_weights: Tensor
    square: Tensor
    expected: Tensor
    labels: Tensor


MIN_EXPECTED_SQUARE = 1e-300
"""Smallest τ with weights in the range of float64; below it the input contributes nothing to F."""


def has_size_biased_draws(likelihood: Likelihood, outputs: Tensor) -> bool:
    """Return whether the family supports size-biased draws; a Gaussian has no rare labels.

    Args:
        likelihood: The family.
        outputs: h [B, ...].
    """
    decide = getattr(likelihood, "has_size_biased_draws", None)
    if decide is not None:  # several families in one
        return bool(decide(outputs))
    draw = getattr(likelihood, "size_biased_quantile", None)
    if draw is None or isinstance(likelihood, Gaussian) or outputs.numel() == 0:
        return False
    if not _matches_family(type(likelihood)):
        return False
    if hasattr(likelihood, "size_biased_sampler"):
        return True
    first = outputs[:1]
    shape = likelihood.label_shape(first)
    medians = torch.full(shape, 0.5, dtype=torch.float64, device=outputs.device)
    return draw(first, medians) is not None


def _matches_family(family: type) -> bool:
    """Return whether the draws belong to this class, not to a parent with another distribution."""
    # position in the inheritance order of the class that defines each method; 0 is the family itself
    level = {n: i for i, c in reversed([*enumerate(family.__mro__)]) for n in vars(c)}
    method = "size_biased_quantile"
    if "size_biased_sampler" in level:
        method = "size_biased_sampler"
    elif family.__mro__[level[method]] is Independent:  # it derives them from `probabilities`
        method = "probabilities"
    changed = min(level.get(n, len(family.__mro__)) for n in ("score", "variance", "quantile"))
    return level[method] <= changed


def draw_size_biased(
    likelihood: Likelihood,
    outputs: Tensor,
    uniforms: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
) -> SizeBiasedScores:
    """Draw one set of labels per input, one of them size-biased, and return the scores.

    Args:
        likelihood: A family for which ``has_size_biased_draws`` is True.
        outputs: h [B, ...].
        uniforms: In (0, 1), float64, of the labels' shape [B, ...].
        positions: In (0, 1), float64 [B], which select the label that is drawn from q_t.
        mask: Bool, of the labels' shape; False leaves a label out.

    >>> from fimprobe.likelihoods import Bernoulli
    >>> h, u = torch.tensor([[8.0, 7.0]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    >>> draw = draw_size_biased(Bernoulli(), h, u, torch.tensor([0.9], dtype=torch.float64))
    >>> draw.scores.sign().tolist()  # the second label, of smaller p, is the less likely one
    [[1.0, -1.0]]
    """
    return make_sampler(likelihood, outputs, mask).draw(uniforms, positions)


def make_sampler(
    likelihood: Likelihood, outputs: Tensor, mask: Tensor | None = None
) -> SizeBiasedSampler:
    """Return the sampler for some outputs; a family may define its own.

    Args:
        likelihood: The family.
        outputs: h [B, ...].
        mask: Bool, of the labels' shape; False leaves a label out.
    """
    make = getattr(likelihood, "size_biased_sampler", SizeBiasedSampler.of(likelihood))
    sampler: SizeBiasedSampler = make(outputs, mask)
    return sampler


class SizeBiasedSampler:
    """Draws size-biased labels by the methods of any family; draws share what they can.

    Args:
        family: The family.
        outputs: h [B, ...], T labels per input.
        expected: τ of each label, float64, of the labels' shape.
        mask: Bool, of the labels' shape; False leaves a label out.
    """

    def __init__(self, family: Any, outputs: Tensor, expected: Tensor, mask: Tensor | None) -> None:
        self.family, self.outputs, self.mask = family, outputs, mask
        self.size, self.shape = len(outputs), expected.shape
        if mask is not None:
            expected = expected * mask
        self.expected = expected.reshape(self.size, -1)
        self.total = self.expected.sum(1)
        self.excluded = _excluded_inputs(family, outputs, mask)

    @classmethod
    def of(cls, family: Any) -> Callable[[Tensor, Tensor | None], SizeBiasedSampler]:
        """Return a constructor for a family, which takes outputs and mask."""

        def make(outputs: Tensor, mask: Tensor | None) -> SizeBiasedSampler:
            """Return the sampler of the family for some outputs.

            Args:
                outputs: h [B, ...].
                mask: Bool, of the labels' shape; False leaves a label out. None keeps all.
            """
            h = outputs.double()
            return cls(family, h, family.expected_squared_score(h), mask)

        return make

    def draw(self, uniforms: Tensor, positions: Tensor) -> SizeBiasedScores:
        """Draw one set of labels per input, and return the scores.

        Args:
            uniforms: In (0, 1), float64, of the labels' shape [B, ...].
            positions: In (0, 1), float64 [B], which select the label that is drawn from q_t.
        """
        if self.expected.shape[1] == 1:
            labels = self.biased_labels(uniforms)
        else:
            labels = self._mixture_labels(uniforms, positions)
        if self.excluded is not None:  # a mixture needs all positions of an input
            excluded = self.excluded.view(-1, *[1] * (labels.dim() - 1))
            labels = torch.where(excluded, self.plain_labels(uniforms).to(labels.dtype), labels)
        scores, square = self.scores_of(labels)
        total = self.total
        valid = (total > MIN_EXPECTED_SQUARE) & (square > 0) & total.isfinite()
        inverse = torch.where(valid, square / total.where(valid, 1), 0)
        root = torch.where(valid, (total / square.where(valid, 1)).sqrt(), 0)
        length = total
        if self.excluded is not None:
            inverse = inverse.masked_fill(self.excluded, 1)
            root = root.masked_fill(self.excluded, 1)
            length = torch.where(self.excluded, square, total)
        scores *= root.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1))
        return SizeBiasedScores(
            scores=scores,
            inverse_weights=inverse,
            square=length,
            expected=total,
            labels=labels,
        )

    def _mixture_labels(self, uniforms: Tensor, positions: Tensor) -> Tensor:
        """Return labels from the model, with the one at the chosen position drawn from q_t."""
        labels = self.plain_labels(uniforms)
        chosen = self._choose(positions)
        rows = torch.arange(self.size, device=labels.device)
        flat = labels.reshape(self.size, -1)
        u = uniforms.reshape(self.size, -1)[rows, chosen]
        flat[rows, chosen] = self.draw_chosen(chosen, u).to(flat.dtype)
        return flat.view(labels.shape)

    def draw_chosen(self, chosen: Tensor, uniforms: Tensor) -> Tensor:
        """Return the size-biased label at one position of every input [B].

        Args:
            chosen: Index of the position [B].
            uniforms: In (0, 1), float64 [B].
        """
        of_position = select_position(self.family, self.outputs, chosen)
        u = uniforms.view(self.family.label_shape(of_position))
        labels: Tensor = self.family.size_biased_quantile(of_position, u)
        return labels.reshape(-1)

    def biased_labels(self, uniforms: Tensor) -> Tensor:
        """Return size-biased labels of inputs with one label each, at the uniforms [B, ...]."""
        labels: Tensor = self.family.size_biased_quantile(self.outputs, uniforms)
        return labels

    def plain_labels(self, uniforms: Tensor) -> Tensor:
        """Return labels from the model at the uniforms [B, ...]."""
        labels: Tensor = self.family.quantile(self.outputs, uniforms)
        return labels

    def scores_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of labels, in memory that may be overwritten.

        Args:
            labels: Of the labels' shape [B, ...].

        Returns:
            δ of the outputs' shape, zero where the mask is False, and ‖δ‖² of every input [B].
        """
        scores = self.family.score(self.outputs, labels)
        if self.mask is not None:
            scores = scores.masked_fill(~spread_mask(self.family, self.mask, scores), 0)
        return scores, scores.reshape(self.size, -1).square().sum(1)

    def _choose(self, positions: Tensor) -> Tensor:
        """Return the index of one label of every input [B], with probability τ_t/τ."""
        edges = self.expected.cumsum(1)
        target = positions.unsqueeze(1) * edges[:, -1:]
        # the last positions may be masked: without mass, they must not be chosen
        chosen = torch.searchsorted(edges, target, right=True)
        return torch.minimum(chosen, (edges < edges[:, -1:]).sum(1, keepdim=True)).squeeze(1)


def expected_squares(
    likelihood: Likelihood, outputs: Tensor, mask: Tensor | None = None
) -> Tensor | None:
    """Return τ of every input [B], float64; None if the family does not define it.

    Args:
        likelihood: The family.
        outputs: h [B, ...].
        mask: Bool, of the labels' shape; False leaves a label out.
    """
    expected_squared_score = getattr(likelihood, "expected_squared_score", None)
    if expected_squared_score is None:
        return None
    expected: Tensor | None = expected_squared_score(outputs.double())
    if expected is None:
        return None
    if mask is not None:
        expected = expected * mask
    return expected.reshape(len(outputs), -1).sum(1)


def _excluded_inputs(family: Any, h: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return which inputs [B] have a label without size-biased draws; None for none of them."""
    cut_off = getattr(family, "cut_off", None)
    labels = None if cut_off is None else cut_off(h)
    if labels is None:
        return None
    if mask is not None:
        labels = labels & mask
    inputs: Tensor = labels.reshape(len(h), -1).any(1)
    return inputs


def select_position(family: Any, h: Tensor, chosen: Tensor) -> Tensor:
    """Return the outputs of one position of every input, the class dimension in its place.

    Args:
        family: A family, with ``class_dim`` if a position has several outputs.
        h: Outputs [B, ...].
        chosen: Index of the position of every input [B].

    Returns:
        [B, 1, ...] with the number of dimensions of ``h``.
    """
    axis = getattr(family, "class_dim", None)
    rows = torch.arange(len(h), device=h.device)
    if axis is None:
        return h.reshape(len(h), -1)[rows, chosen].view(-1, *[1] * (h.dim() - 1))
    last = h.movedim(axis, -1)
    logits = last.reshape(len(h), -1, last.shape[-1])[rows, chosen]
    return logits.view(len(h), *[1] * (h.dim() - 2), -1).movedim(-1, axis)
