"""What is pulled back from the outputs: scores of labels, Hutchinson's seeds, the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.primitives.device_transfer import to_device
from fimprobe.engines.primitives.random_signs import signs
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.weights import GRAM_LIMIT, Weights
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Gaussian
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.size_biased import expected_squares, has_size_biased_draws, make_sampler

PASS_LIMIT = 4096
"""Most backward passes that ``draws="exact"`` takes."""


MAX_CENTRED_CLASSES = 64
"""Up to so many classes (17) is also taken with centred logits; of more, their mean is no part."""


@dataclass
class Cotangents:
    """Gradients [B, ...] at the outputs, pulled back together; ``weights`` of their powers."""

    seeds: list[Tensor]
    weights: Weights | None
    mix: Tensor | None = None
    """[B, n, m]: Gram matrices are wanted of these n combinations of the m seeds, of which the first
    are the seeds that have a weight."""
    seen: Tensor | None = None
    """Of labels: Σ‖δ‖² over the samples, as the mean over draws, and its expectation, [2]."""


def label_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """Scores of the drawn labels (√w δ where they are size-biased), or the exact passes."""
    if problem.draws.count is None:
        # m − v² of a Bernoulli label near p = ½ has no digits in float32
        passes = _passes(problem.likelihood.exact_passes(h.double(), mask_of(problem, rows, h)), h)
        # masked labels weigh nothing, but Î₂'s bounds see the seeds themselves
        scores = [_masked(problem, rows, h, s) for s in passes.seeds]
        return Cotangents(scores, passes.weights, seen=_seen_mass(problem, rows, h, None))
    draws, family = problem.draws, problem.likelihood
    uniforms = _uniforms(problem, rows, h)
    if draws.size_biased and has_size_biased_draws(family, h):
        positions = to_device(draws.positions_for(rows, problem.batch.size), h.device)
        return _size_biased_seeds(problem, h, mask_of(problem, rows, h), uniforms, positions)
    found = [_masked(problem, rows, h, _drawn_scores(problem, h, u)) for u in uniforms.unbind(1)]
    return Cotangents(found, None, seen=_seen_mass(problem, rows, h, found))


def _size_biased_seeds(
    problem: Problem, h: Tensor, mask: Tensor | None, uniforms: Tensor, positions: Tensor
) -> Cotangents:
    """Size-biased labels of each sample; samples do not meet in it."""
    count = positions.shape[1]
    scores = [torch.empty_like(h) for _ in range(count)]
    inverse, square, expected = (torch.empty_like(positions) for _ in range(3))
    step = labels_per_draw(h) // max(1, h[0].numel())
    for start in range(0, len(h), step):
        part = slice(start, start + step)
        keep = None if mask is None else mask[part]
        sampler = make_sampler(problem.likelihood, h[part], keep)
        for s in range(count):
            drawn = sampler.draw(uniforms[part, s], positions[part, s])
            scores[s][part] = drawn.scores
            inverse[part, s], square[part, s] = drawn.inverse_weights, drawn.square
            expected[part, s] = drawn.expected
    seen = torch.stack([square.sum(), expected.sum()]) / count
    return Cotangents(scores, Weights(None, inverse, list(range(count))), seen=seen)


def _seen_mass(
    problem: Problem, rows: slice, h: Tensor, scores: list[Tensor] | None
) -> Tensor | None:
    """Σ‖δ‖² of the labels, mean over draws (``scores``; None: not needed), and its expectation."""
    expected = expected_squares(problem.likelihood, h, mask_of(problem, rows, h))
    if expected is None:
        return None
    total = expected.sum()
    if scores is None:
        return torch.stack([total, total])
    return torch.stack([torch.stack([s.double().square().sum() for s in scores]).mean(), total])


def seen_mass(problem: Problem, seen: list[float] | None) -> float | None:
    """Σ‖δ‖² of labels drawn from the model over its expectation; None where it cannot be far off.

    That is with exact and with size-biased labels, and of a Gaussian, which has no rare labels.
    """
    if problem.draws.count is None or isinstance(problem.likelihood, Gaussian):
        return None
    if seen is None or seen[1] <= 0 or seen[0] == seen[1]:
        return None
    return seen[0] / seen[1]


DRAWN_AT_ONCE = 2**26
"""Outputs whose labels are drawn together, in float64: of a language model, a few samples'."""

DRAWN_IN_CACHE = 2**17
"""The same on a CPU."""


def labels_per_draw(h: Tensor) -> int:
    """How many outputs that is: whole samples, at least one."""
    each = max(1, h[0].numel())
    most = DRAWN_IN_CACHE if h.device.type == "cpu" else DRAWN_AT_ONCE
    return each * min(len(h), max(1, most // each))


def _drawn_scores(problem: Problem, h: Tensor, uniforms: Tensor) -> Tensor:
    """The score of each sample's label at ``uniforms``, [B, ...]; samples do not meet in it."""
    family = problem.likelihood
    step = labels_per_draw(h) // max(1, h[0].numel())
    if step >= len(h):
        return family.score(h, family.quantile(h, uniforms))
    scores = torch.empty_like(h)
    for part, u, to in zip(h.split(step), uniforms.split(step), scores.split(step), strict=True):
        to.copy_(family.score(part, family.quantile(part, u)))
    return scores


def hutchinson_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """L ξ with L Lᵀ = I(h) and ξ Rademacher, or the columns of L: the passes over all ξ."""
    if problem.draws.count is None:
        return fisher_cotangents(problem, rows, h)
    family: Any = problem.likelihood
    count = problem.draws.count if problem.ask.ih else 1
    found = []
    for i in range(count):
        xi = _signs(problem, rows, h, f"hutchinson {i}")
        found.append(_masked(problem, rows, h, family.fisher_factor(h, xi)))
    return Cotangents(found, None)


def fisher_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """The columns of L with L Lᵀ = I(h): their weighted squares make F exactly."""
    family: Any = problem.likelihood
    return _passes(family.hutchinson_passes(h, mask_of(problem, rows, h)), h)


def data_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """Scores of the data's own labels."""
    family: Any = problem.likelihood
    labels = problem.ask.labels
    assert labels is not None
    return Cotangents(
        [_masked(problem, rows, h, family.data_score(h, labels[rows].to(h.device)))], None
    )


def output_cotangents(problem: Problem, rows: slice, h: Tensor, norms: OutputNorms) -> Cotangents:
    """Seeds for ‖J‖: one unit vector for each output where labels are exact, else K random signs.

    Their squares are weighted so that Q becomes Σ_i λ_max(M) ‖J_i‖⁴ (for signs: Q − A4 does). For
    up to FEW_CLASSES classes, the sign vectors' means over the classes follow, with weight 0; where
    an output has one position they are multiples of one vector, which is pulled back in their place.
    """
    top = norms.moment_max.to(h.dtype).unsqueeze(1)
    keep = _masked(problem, rows, h, torch.ones_like(h))
    if problem.draws.count is None:
        order = _class_last(problem, keep)
        units = torch.eye(order[0].numel(), dtype=h.dtype, device=h.device)
        found = []
        for unit in units:
            seed = unit.view(order[0].shape).expand(order.shape) * order
            found.append(_class_back(problem, seed, h))
        weights = top.sqrt().expand(-1, len(found))
        return Cotangents(found, Weights(weights, torch.zeros_like(weights), [0] * len(found)))
    count = problem.ask.probes
    found = sign_seeds(problem, rows, keep, count)
    axis = getattr(problem.likelihood, "class_dim", None)
    means: list[Tensor] = []
    mix: Tensor | None = None
    if axis is not None and h.shape[axis] <= MAX_CENTRED_CLASSES and 2 * count <= GRAM_LIMIT:
        averages = [u.mean(axis, keepdim=True) for u in found]
        if averages[0].numel() == len(h):
            mix = h.new_zeros(len(h), 2 * count, count + 1)
            mix[:, :count, :count] = torch.eye(count, dtype=h.dtype, device=h.device)
            mix[:, count:, count] = torch.stack([a.flatten() for a in averages], 1)
            means = [keep]
        else:
            means = [a.expand_as(h) for a in averages]
    second = torch.cat([top.sqrt().expand(-1, count), top.new_zeros(len(h), len(means))], 1)
    return Cotangents(
        found + means, Weights(second, second.square(), [0] * count + [1] * len(means)), mix
    )


def sign_seeds(problem: Problem, rows: slice, keep: Tensor, count: int) -> list[Tensor]:
    """Random signs at the outputs where ``keep`` is 1; the same for ‖J‖ and for ‖H‖."""
    return [_signs(problem, rows, keep, f"jacobian {i}") * keep for i in range(count)]


def curvature_cotangents(problem: Problem, rows: slice, h: Tensor, labels: Cotangents) -> Cotangents:
    """Seeds for R: those of the labels, and where bounds are asked for those that ‖H‖ needs.

    Sampled labels: K/2 random signs (at least one), of those for ‖J‖; each is met by two
    Hessian-vector products.
    Exact labels: unit seeds have all of ‖H‖. Softmax scores e_y − p of a position lack its mean:
    Σ_y ‖H_y‖² = Σ_y ‖R_y‖² + (‖H_1‖² − ‖Σ_y R_y‖²)/C, so that Σ_t ε_t 1_t and Σ_t ε_t Σ_y (e_y − p_t)
    follow, with signs ε_t that do not matter where there is one position.
    """
    found, weights = list(labels.seeds), labels.weights
    more: list[Tensor] = []
    if problem.ask.bounds:
        keep = _masked(problem, rows, h, torch.ones_like(h))
        axis = getattr(problem.likelihood, "class_dim", None)
        if problem.draws.count is not None:
            more = sign_seeds(problem, rows, keep, max(1, problem.ask.probes // 2))
        elif axis is not None:
            first = _signs(problem, rows, h, "hessian").narrow(axis, 0, 1)
            more = [first * keep, first * torch.stack(found).sum(0)]
    second = (  # size-biased seeds are √w δ: the squares of √w R have the factor of all draws
        torch.full((len(h), len(found)), 1 / len(found), dtype=torch.float64, device=h.device)
        if weights is None or weights.second is None
        else weights.second.double()
    )
    return Cotangents(found + more, Weights(second, second, [0] * len(found)))


def check_num_passes(
    problem: Problem,
    h: Tensor,
    stash_per_pass: float,
    ceiling: float,
    what: str = "draws='exact'",
    remedy: str = "draws=2",
) -> None:
    """Refuse exact expectations that take too many passes, or too much memory for one sample."""
    passes = problem.likelihood.count_passes(h)
    if passes > PASS_LIMIT:
        raise FimprobeError(
            f"{what} would take {passes} backward passes for each chunk (labels × positions "
            f"of one sample), more than the limit of {PASS_LIMIT}; pass {remedy} instead"
        )
    if passes * stash_per_pass > ceiling:
        raise FimprobeError(
            f"{what} would take {passes} backward passes that keep "
            f"{passes * stash_per_pass / 2**20:.0f} MB for one sample, more than memory_mb="
            f"{ceiling / 2**20:.0f}; pass {remedy} instead, or a larger memory_mb"
        )


def mask_of(problem: Problem, rows: slice, h: Tensor) -> Tensor | None:
    """The rows' mask, checked."""
    mask = None if problem.mask is None else problem.mask[rows]
    shape = problem.likelihood.label_shape(h)
    if mask is not None and mask.shape != shape:
        raise FimprobeError(
            f"mask has shape {tuple(mask.shape)}, but the labels have shape {tuple(shape)}; pass a "
            "boolean tensor with one entry for each label"
        )
    return mask


def _masked(problem: Problem, rows: slice, h: Tensor, seed: Tensor) -> Tensor:
    mask = mask_of(problem, rows, h)
    if mask is not None:
        if mask.dim() < seed.dim():
            mask = mask.unsqueeze(getattr(problem.likelihood, "class_dim", -1))
        seed = seed.masked_fill(~mask, 0)
    return seed.to(h.dtype)


def _uniforms(problem: Problem, rows: slice, h: Tensor) -> Tensor:
    shape = problem.likelihood.label_shape(h)
    return to_device(problem.draws.uniforms_for(rows, problem.batch.size, shape), h.device)


def _signs(problem: Problem, rows: slice, h: Tensor, key: str) -> Tensor:
    draws = problem.draws
    first = draws.first + rows.start
    return signs(h.shape, key, draws.seed, first=first, dtype=h.dtype, device=h.device)


def _class_last(problem: Problem, x: Tensor) -> Tensor:
    axis = getattr(problem.likelihood, "class_dim", None)
    return x if axis is None else x.movedim(axis, -1)


def _class_back(problem: Problem, x: Tensor, like: Tensor) -> Tensor:
    axis = getattr(problem.likelihood, "class_dim", None)
    return (x if axis is None else x.movedim(-1, axis)).reshape(like.shape)


def _passes(passes: Iterator[Pass], h: Tensor) -> Cotangents:
    found = [p._replace(seed=p.seed.to(h.dtype)) for p in passes]
    weights = Weights(
        torch.stack([p.second for p in found], 1),
        torch.stack([p.fourth for p in found], 1),
        [p.block for p in found],
    )
    return Cotangents([p.seed for p in found], weights)
