"""Cotangents at the outputs for the labels of the model: scores of drawn labels, or exact passes.

Symbols as in :mod:`fimprobe.engines.problem.cotangents`; δ = ∂ log p(y|h)/∂h is the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.primitives.device_transfer import to_device
from fimprobe.engines.problem.cotangents import Cotangents, mask_of, masked, stack_passes
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.weights import GRAM_LIMIT, PassWeights
from fimprobe.likelihoods import Categorical, Gaussian
from fimprobe.likelihoods.size_biased import expected_squares, has_size_biased_draws, make_sampler
from fimprobe.likelihoods.softmax_sampler import SoftmaxSampler

MAX_LABELLED_OUTPUTS = 2**26
"""Outputs whose labels are drawn together, in float64: of a language model, those of few samples."""

MAX_LABELLED_OUTPUTS_ON_CPU = 2**17
"""The limit on a CPU, where float64 copies should stay in its cache."""


def label_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """Scores δ of drawn labels (√w δ if they are size-biased), or the passes of exact labels.

    Args:
        problem: The likelihood, the draws and the mask.
        rows: Places of the samples in the batch.
        h: Their outputs, detached.
    """
    if problem.draws.count is None:
        # float64: m − v² of a Bernoulli label near p = ½ has no correct digit in float32
        passes = stack_passes(
            problem.likelihood.exact_passes(h.double(), mask_of(problem, rows, h)), h
        )
        # masked labels have weight 0, but the bounds of Î₂ use the vectors without weights
        return Cotangents(
            vectors=[masked(problem, rows, h, v) for v in passes.vectors],
            weights=passes.weights,
            score_mass=_score_mass(problem, rows, h, None),
        )
    draws, family = problem.draws, problem.likelihood
    uniforms = _uniforms(problem, rows, h)
    has_sampler = has_size_biased_draws(family, h)
    if draws.size_biased and has_sampler:
        positions = to_device(draws.positions_for(rows, problem.batch.size), h.device)
        return _size_biased_cotangents(problem, h, mask_of(problem, rows, h), uniforms, positions)
    if has_sampler and isinstance(family, Categorical):
        return _softmax_cotangents(problem, h, mask_of(problem, rows, h), uniforms)
    scores = [masked(problem, rows, h, _sample_scores(problem, h, u)) for u in uniforms.unbind(1)]
    return Cotangents(vectors=scores, score_mass=_score_mass(problem, rows, h, scores))


def _softmax_cotangents(
    problem: Problem, h: Tensor, mask: Tensor | None, uniforms: Tensor
) -> Cotangents:
    """Scores of class labels from the model; all draws and their mass share one softmax.

    Args:
        problem: The likelihood.
        h: Outputs [B, ...].
        mask: Labels that count.
        uniforms: Random numbers that determine the labels [B, S, ...].
    """
    count = uniforms.shape[1]
    scores = [torch.empty_like(h) for _ in range(count)]
    mass = torch.zeros(2, dtype=torch.float64, device=h.device)
    coincidences = []
    for samples, sampler in _samplers(problem, h, mask):
        squares, labels = [], []
        for s in range(count):
            labels.append(sampler.plain_labels(uniforms[samples, s]))
            scores[s][samples], square = sampler.scores_of(labels[s])
            squares.append(square.sum())
        mass += torch.stack([torch.stack(squares).mean(), sampler.total.sum()])
        if _knows_coincidences(sampler, count):
            coincidences.append(sampler.unexpected_coincidences(labels))
    weights = None
    if coincidences:
        difference = torch.cat(coincidences)
        ones, block = torch.ones_like(difference), list(range(count))
        weights = PassWeights(None, ones, block, difference, from_model=True)
    return Cotangents(vectors=scores, weights=weights, score_mass=mass)


def _size_biased_cotangents(
    problem: Problem, h: Tensor, mask: Tensor | None, uniforms: Tensor, positions: Tensor
) -> Cotangents:
    """Scores √w δ of size-biased labels, a few samples at a time: each depends on its sample only.

    Args:
        problem: The likelihood.
        h: Outputs [B, ...].
        mask: Labels that count.
        uniforms: Random numbers that determine the labels [B, S, ...].
        positions: Random numbers that determine the position of the size-biased label [B, S].
    """
    count = positions.shape[1]
    scores = [torch.empty_like(h) for _ in range(count)]
    inverse, square, expected = (torch.empty_like(positions) for _ in range(3))
    coincidences = []
    for samples, sampler in _samplers(problem, h, mask):
        labels = []
        for s in range(count):
            drawn = sampler.draw(uniforms[samples, s], positions[samples, s])
            scores[s][samples] = drawn.scores
            inverse[samples, s], square[samples, s] = drawn.inverse_weights, drawn.square
            expected[samples, s] = drawn.expected
            labels.append(drawn.labels)
        if _knows_coincidences(sampler, count):
            coincidences.append(sampler.unexpected_coincidences(labels, inverse[samples]))
    difference = torch.cat(coincidences) if coincidences else None
    return Cotangents(
        vectors=scores,
        weights=PassWeights(None, inverse, list(range(count)), difference),
        score_mass=torch.stack([square.sum(), expected.sum()]) / count,
    )


def _knows_coincidences(sampler: Any, count: int) -> bool:
    """Whether the probability of equal draws is known: one class label per input, few draws."""
    if not isinstance(sampler, SoftmaxSampler):
        return False
    return sampler.expected.shape[1] == 1 and 1 < count <= GRAM_LIMIT


def _samplers(problem: Problem, h: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Any]]:
    """Yield samplers of labels for a few samples at a time, with their places.

    Args:
        problem: The likelihood.
        h: Outputs [B, ...].
        mask: Labels that count.
    """
    step = _samples_per_draw(h)
    for start in range(0, len(h), step):
        samples = slice(start, start + step)
        keep = None if mask is None else mask[samples]
        yield samples, make_sampler(problem.likelihood, h[samples], keep)


def _score_mass(
    problem: Problem, rows: slice, h: Tensor, scores: list[Tensor] | None
) -> Tensor | None:
    """Σ‖δ‖² as the mean over draws, and its expectation [2]; None if that has no closed form.

    ``scores`` are those of the draws; None for exact labels, whose mean is the expectation.
    """
    expected = expected_squares(problem.likelihood, h, mask_of(problem, rows, h))
    if expected is None:
        return None
    total = expected.sum()
    if scores is None:
        return torch.stack([total, total])
    return torch.stack([torch.stack([s.double().square().sum() for s in scores]).mean(), total])


def seen_mass(problem: Problem, score_mass: list[float] | None) -> float | None:
    """Σ‖δ‖² of labels drawn from the model, divided by its expectation.

    None for exact and size-biased labels, which represent rare labels, and for a Gaussian, which has
    no rare labels: the ratio cannot be far from 1 there.

    Args:
        problem: The likelihood and the draws.
        score_mass: Σ‖δ‖² and its expectation.
    """
    if problem.draws.count is None or isinstance(problem.likelihood, Gaussian):
        return None
    if score_mass is None or score_mass[1] <= 0 or score_mass[0] == score_mass[1]:
        return None
    return score_mass[0] / score_mass[1]


def labels_per_draw(h: Tensor) -> int:
    """Number of outputs whose labels are drawn together: those of whole samples, at least one."""
    return _samples_per_draw(h) * _outputs_per_sample(h)


def _samples_per_draw(h: Tensor) -> int:
    """Number of samples whose labels are drawn together."""
    limit = MAX_LABELLED_OUTPUTS_ON_CPU if h.device.type == "cpu" else MAX_LABELLED_OUTPUTS
    return min(h.shape[0], max(1, limit // _outputs_per_sample(h)))


def _outputs_per_sample(h: Tensor) -> int:
    return max(1, math.prod(h.shape[1:]))


def _sample_scores(problem: Problem, h: Tensor, uniforms: Tensor) -> Tensor:
    """Scores [B, ...] of the labels at ``uniforms``, a few samples at a time."""
    family = problem.likelihood
    step = _samples_per_draw(h)
    if step >= len(h):
        return family.score(h, family.quantile(h, uniforms))
    scores = torch.empty_like(h)
    pieces = zip(h.split(step), uniforms.split(step), scores.split(step), strict=True)
    for outputs, u, destination in pieces:
        destination.copy_(family.score(outputs, family.quantile(outputs, u)))
    return scores


def _uniforms(problem: Problem, rows: slice, h: Tensor) -> Tensor:
    """Random numbers [B, S, ...] that determine the labels."""
    shape = problem.likelihood.label_shape(h)
    return to_device(problem.draws.uniforms_for(rows, problem.batch.size, shape), h.device)
