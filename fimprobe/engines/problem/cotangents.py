"""Cotangents at the outputs: Hutchinson's vectors, scores of given labels, vectors for bounds.

Symbols: B samples, S vectors pulled back for each, h the outputs [B, ...], I(h) the Fisher
information of the outputs, J = ∂h/∂θ. ``rows`` are the samples' places in the batch. Together with
the seed they determine every random number, so that chunks and processes do not change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.primitives.random_signs import rademacher
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.weights import GRAM_LIMIT, PassWeights
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.independent import Independent
from fimprobe.likelihoods.output_mask import spread_mask

MAX_PASSES = 4096
"""Maximum number of backward passes of ``draws="exact"`` for one chunk."""

MAX_CENTRED_CLASSES = 64
"""Up to this number of classes the bounds also use centred logits. With more classes the means over
classes contribute little. See docs/theory.md, "Bounds"."""


@dataclass(kw_only=True)
class Cotangents:
    """Vectors at the outputs that are pulled back together.

    Attributes:
        vectors: S tensors of the shape of the outputs [B, ...].
        weights: Weights of the gradients' powers; None where all of them are 1.
        combinations: Coefficients [B, n, S]. If set, Gram matrices are computed of these n
            combinations of the vectors; the first combinations are the vectors with a weight.
        score_mass: For labels: Σ‖δ‖² over the samples, as the mean over draws, and its expectation
            [2].
    """

    vectors: list[Tensor]
    weights: PassWeights | None = None
    combinations: Tensor | None = None
    score_mass: Tensor | None = None

    @property
    def are_size_biased(self) -> bool:
        """Whether these are scores √w δ of size-biased labels."""
        return self.weights is not None and self.weights.are_size_biased


def hutchinson_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """L ξ with L Lᵀ = I(h) and Rademacher ξ; for exact labels the columns of L, with weights.

    Args:
        problem: The likelihood, the draws and the mask.
        rows: Places of the samples in the batch.
        h: Their outputs, detached.
    """
    if problem.draws.count is None:
        return fisher_cotangents(problem, rows, h)
    family: Any = problem.likelihood
    count = problem.draws.count if problem.request.ih else 1
    vectors = []
    for i in range(count):
        xi = _signs(problem, rows, h, f"hutchinson {i}")
        vectors.append(masked(problem, rows, h, family.fisher_factor(h, xi)))
    return Cotangents(vectors=vectors)


def fisher_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """The columns of L with L Lᵀ = I(h): the weighted sum of their g² is the diagonal of F.

    Args:
        problem: The likelihood and the mask.
        rows: Places of the samples in the batch.
        h: Their outputs, detached.
    """
    family: Any = problem.likelihood
    return stack_passes(family.hutchinson_passes(h, mask_of(problem, rows, h)), h)


def data_cotangents(problem: Problem, rows: slice, h: Tensor) -> Cotangents:
    """Scores of the data's labels, for the empirical Fisher.

    Args:
        problem: The likelihood, the labels and the mask.
        rows: Places of the samples in the batch.
        h: Their outputs, detached.
    """
    family: Any = problem.likelihood
    labels = problem.request.labels
    assert labels is not None
    scores = family.data_score(h, labels[rows].to(h.device))
    return Cotangents(vectors=[masked(problem, rows, h, scores)])


def output_cotangents(problem: Problem, rows: slice, h: Tensor, norms: OutputNorms) -> Cotangents:
    """Vectors that measure ‖J‖: a unit vector for each output if labels are exact, else K signs.

    The weights of g² are chosen such that Q becomes Σ_i λ_max(M) ‖J_i‖⁴; for signs Q − A4 does.

    The bounds also use centred logits, for up to ``MAX_CENTRED_CLASSES`` classes. For them the means
    of the sign vectors over the classes follow, with weight 0. If an output has one position, these
    means are multiples of one vector. Only that vector is pulled back, and ``combinations`` has the
    multiples.

    Args:
        problem: The likelihood, the draws, the mask and K.
        rows: Places of the samples in the batch.
        h: Their outputs, detached.
        norms: Norms of I(h) and M of these outputs.
    """
    moment_max = norms.moment_max.to(h.dtype).unsqueeze(1)
    keep = masked(problem, rows, h, torch.ones_like(h))
    if problem.draws.count is None:
        vectors = _unit_vectors(problem, keep, h)
        square = moment_max.sqrt().expand(-1, len(vectors))
        weights = PassWeights(square, torch.zeros_like(square), [0] * len(vectors))
        return Cotangents(vectors=vectors, weights=weights)
    count = problem.request.probes
    vectors = sign_cotangents(problem, rows, keep, count)
    means, combinations = _class_means(problem, keep, vectors)
    square = torch.cat(
        [moment_max.sqrt().expand(-1, count), moment_max.new_zeros(len(h), len(means))], 1
    )
    weights = PassWeights(square, square.square(), [0] * count + [1] * len(means))
    return Cotangents(vectors=vectors + means, weights=weights, combinations=combinations)


def _unit_vectors(problem: Problem, keep: Tensor, h: Tensor) -> list[Tensor]:
    """Unit vectors at the outputs of each sample, the classes of a position one after the other.

    Args:
        problem: The likelihood.
        keep: 1 at outputs that count, 0 at masked ones [B, ...].
        h: The outputs [B, ...].
    """
    class_last = _class_last(problem, keep)
    units = torch.eye(class_last[0].numel(), dtype=h.dtype, device=h.device)
    vectors = []
    for unit in units:
        vector = unit.view(class_last[0].shape).expand(class_last.shape) * class_last
        vectors.append(_class_back(problem, vector, h))
    return vectors


def _class_means(
    problem: Problem, keep: Tensor, signs: list[Tensor]
) -> tuple[list[Tensor], Tensor | None]:
    """Means of sign vectors over the classes, and the combinations that contain them.

    Args:
        problem: The likelihood.
        keep: 1 at outputs that count, 0 at masked ones [B, ...].
        signs: K sign vectors of the shape of the outputs.
    """
    count, size = len(signs), len(keep)
    axis = getattr(problem.likelihood, "class_dim", None)
    # beyond GRAM_LIMIT the inner products of means and signs would not be kept
    if axis is None or keep.shape[axis] > MAX_CENTRED_CLASSES or 2 * count > GRAM_LIMIT:
        return [], None
    means = [u.mean(axis, keepdim=True) for u in signs]
    if means[0].numel() != size:  # several positions: the means are not multiples of one vector
        return [mean.expand_as(keep) for mean in means], None
    combinations = keep.new_zeros(size, 2 * count, count + 1)
    combinations[:, :count, :count] = torch.eye(count, dtype=keep.dtype, device=keep.device)
    combinations[:, count:, count] = torch.stack([mean.flatten() for mean in means], 1)
    return [keep], combinations


def sign_cotangents(problem: Problem, rows: slice, keep: Tensor, count: int) -> list[Tensor]:
    """Random signs at the outputs where ``keep`` is 1; ‖J‖ and ‖H‖ use the same ones.

    Args:
        problem: The draws.
        rows: Places of the samples in the batch.
        keep: 1 at outputs that count, 0 at masked ones [B, ...].
        count: Number of vectors.
    """
    return [_signs(problem, rows, keep, f"jacobian {i}") * keep for i in range(count)]


def curvature_cotangents(problem: Problem, rows: slice, h: Tensor, labels: Cotangents) -> Cotangents:
    """Vectors c of R = Σ_a c_a ∂²h_a: those of the labels, then those that ‖H‖ needs for bounds.

    Sampled labels: K/2 of the random signs for ‖J‖, at least one; two Hessian-vector products are
    formed with each.

    Exact labels: unit vectors determine ‖H‖ completely. Softmax scores e_y − p have no component
    along 1, the vector of ones over the classes. With H_y = Σ_a (e_y)_a ∂²h_a and R_y that of the
    score,
    Σ_y ‖H_y‖² = Σ_y ‖R_y‖² + (‖H_1‖² − ‖Σ_y R_y‖²)/C.
    Two more vectors are needed: Σ_t ε_t 1_t and Σ_t ε_t Σ_y (e_y − p_t), summed over positions t
    with signs ε_t. The signs do not matter if there is one position. Several heads have labels of
    different kinds; there the unit vectors follow.

    Args:
        problem: The likelihood, the draws, the mask and K.
        rows: Places of the samples in the batch.
        h: Their outputs, detached.
        labels: The cotangents of the labels.

    Returns:
        Cotangents with weights of R², over the label vectors only.
    """
    scores, weights = list(labels.vectors), labels.weights
    for_bounds: list[Tensor] = []
    if problem.request.bounds:
        keep = masked(problem, rows, h, torch.ones_like(h))
        axis = getattr(problem.likelihood, "class_dim", None)
        if problem.draws.count is not None:
            for_bounds = sign_cotangents(problem, rows, keep, max(1, problem.request.probes // 2))
        elif axis is not None:
            signs = _signs(problem, rows, h, "hessian").narrow(axis, 0, 1)
            for_bounds = [signs * keep, signs * torch.stack(scores).sum(0)]
        elif not isinstance(problem.likelihood, Independent):  # its passes are no unit vectors
            for_bounds = _unit_vectors(problem, keep, h)
    # size-biased vectors are √w δ: the squares of √w R have the weight 1/S of all draws
    square = (
        torch.full((len(h), len(scores)), 1 / len(scores), dtype=torch.float64, device=h.device)
        if weights is None or weights.square is None
        else weights.square.double()
    )
    return Cotangents(
        vectors=scores + for_bounds, weights=PassWeights(square, square, [0] * len(scores))
    )


def check_num_passes(
    problem: Problem,
    h: Tensor,
    bytes_per_pass: float,
    limit_bytes: float,
    option: str = "draws='exact'",
    remedy: str = "draws=2",
) -> None:
    """Refuse exact expectations that take too many passes, or too much memory for one sample.

    Args:
        problem: The likelihood.
        h: Outputs of a chunk.
        bytes_per_pass: Bytes of the cotangents that one pass keeps for one sample.
        limit_bytes: The memory limit.
        option: The option that asks for exact expectations.
        remedy: The option to use instead.

    Raises:
        FimprobeError: If there are too many passes, or they keep too many bytes.
    """
    passes = problem.likelihood.count_passes(h)
    if passes > MAX_PASSES:
        raise FimprobeError(
            f"{option} would take {passes} backward passes for each chunk (labels × positions "
            f"of one sample), more than the limit of {MAX_PASSES}. Pass {remedy} instead."
        )
    if passes * bytes_per_pass > limit_bytes:
        raise FimprobeError(
            f"{option} would take {passes} backward passes that keep "
            f"{passes * bytes_per_pass / 2**20:.0f} MB for one sample, more than memory_mb="
            f"{limit_bytes / 2**20:.0f}. Pass {remedy} instead, or a larger memory_mb."
        )


def mask_of(problem: Problem, rows: slice, h: Tensor) -> Tensor | None:
    """The mask of some samples, checked; None if all labels count.

    Args:
        problem: The likelihood and the mask of the batch.
        rows: Places of the samples in the batch.
        h: Their outputs.
    """
    mask = None if problem.mask is None else problem.mask[rows]
    shape = problem.likelihood.label_shape(h)
    if mask is not None and mask.shape != shape:
        raise FimprobeError(
            f"`mask` must have the shape of the labels, {tuple(shape)}, got {tuple(mask.shape)}. "
            "Pass a boolean tensor with one entry for each label."
        )
    return mask


def masked(problem: Problem, rows: slice, h: Tensor, vector: Tensor) -> Tensor:
    """The vector in the type of the outputs, with zeros at masked labels.

    Args:
        problem: The likelihood and the mask of the batch.
        rows: Places of the samples in the batch.
        h: Their outputs [B, ...].
        vector: A vector of the shape of the outputs.

    Raises:
        FimprobeError: If the mask has another shape than the labels.
    """
    mask = mask_of(problem, rows, h)
    if mask is not None:
        vector = vector.masked_fill(~spread_mask(problem.likelihood, mask, vector), 0)
    return vector.to(h.dtype)


def _signs(problem: Problem, rows: slice, h: Tensor, key: str) -> Tensor:
    """Random signs of the shape of the outputs, from the stream ``key``."""
    draws = problem.draws
    first = draws.first + rows.start
    return rademacher(h.shape, key, draws.seed, first=first, dtype=h.dtype, device=h.device)


def _class_last(problem: Problem, x: Tensor) -> Tensor:
    """``x`` with the class dimension last."""
    axis = getattr(problem.likelihood, "class_dim", None)
    return x if axis is None else x.movedim(axis, -1)


def _class_back(problem: Problem, x: Tensor, like: Tensor) -> Tensor:
    """Invert :func:`_class_last`, to the shape of ``like``."""
    axis = getattr(problem.likelihood, "class_dim", None)
    return (x if axis is None else x.movedim(-1, axis)).reshape(like.shape)


def stack_passes(passes: Iterator[Pass], h: Tensor) -> Cotangents:
    """Cotangents of exact passes, in the type of the outputs, with their weights side by side.

    Args:
        passes: S passes of B samples, ordered by block.
        h: The outputs [B, ...], whose type is used.

    Returns:
        S vectors [B, ...], with weights [B, S].
    """
    in_dtype = [p._replace(cotangent=p.cotangent.to(h.dtype)) for p in passes]
    weights = PassWeights(
        torch.stack([p.square for p in in_dtype], 1),
        torch.stack([p.quartic for p in in_dtype], 1),
        [p.block for p in in_dtype],
    )
    return Cotangents(vectors=[p.cotangent for p in in_dtype], weights=weights)
