"""Bounds and covariance norms of every group of parameters, added to its estimates.

Symbols: B inputs, G groups, n cotangents, K random signs, J directions of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fimprobe.estimators.covariance_norms import (
    centre_classes,
    eigenvalues,
    hessian_covariance_square,
    largest_eigenvalue,
    score_covariance_norm,
    score_covariance_spectral_norm,
    square_of_mean,
)
from fimprobe.estimators.estimate import Estimate, Geometry, to_rows
from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.statistics import Measured, MomentsBatch


def add_i1_bounds(
    measured: Measured, groups: Groups, estimates: Mapping[str, Estimate]
) -> tuple[dict[str, Estimate], dict[str, Geometry]]:
    """Add to Î₁ the norms of its covariance, (17) and its sharper forms, trace and diagonal bounds.

    Args:
        measured: The statistics of the batch, with ``norms`` and the moments of the Jacobian.
        groups: The parameters of each group.
        estimates: Î₁ of each group.

    Returns:
        The estimates with their bounds, and the norms of the Jacobian of each group.
    """
    norms, jacobian = measured.norms, measured.moments["jacobian"]
    scores = measured.moments["i1"]
    assert norms is not None
    exact = scores.draws is None  # then the output cotangents are unit vectors
    size = jacobian.batch_size
    group_sums = GroupSums.of(groups)
    squares = group_sums.sum(jacobian.parameters, "squared_norms")
    gram = group_sums.sum_known(jacobian.parameters, "gram")
    a4, q, _, _ = group_sums.sum(jacobian.parameters, "powers").sum(-1).unbind(1)
    if gram is None and squares.shape[-1] == 1:
        gram = squares.unsqueeze(-1)
    sharp_fourth, spectral, error = None, None, None  # ‖J‖⁴ in its sharper form, s_max(J)
    if exact:
        frobenius = squares.sum(-1)
        fourth = frobenius.square()
        diagonal = q / size
        if gram is not None:
            sharp_fourth = largest_eigenvalue(centre_classes(gram, jacobian.classes)).square()
            spectral = largest_eigenvalue(gram).mean(-1).sqrt()
    else:
        signs = _num_signs(jacobian)
        frobenius = squares[..., :signs].mean(-1)
        fourth, variance = square_of_mean(squares[..., :signs])
        error = (variance * norms.moment_norm.square()).sum(-1).sqrt() / size
        diagonal = (q - a4) / (signs * (signs - 1)) / size
        if gram is not None and gram.shape[-1] == 2 * signs:
            sharp_fourth = square_of_mean(_centred_squares(gram, signs))[0]
    if sharp_fourth is None:
        sharp_fourth = fourth
    columns = {
        "bound": (fourth * norms.moment_norm).mean(-1),
        "bound_error": error,
        "sharp_bound": (sharp_fourth * norms.moment_norm).mean(-1),
        "trace_bound": (sharp_fourth * norms.moment_trace).mean(-1),
        "diagonal_bound": diagonal,
        **_covariance_columns(scores, group_sums, jacobian.classes),
    }
    low, high = ((frobenius * norm).mean(-1) for norm in (norms.fisher_min, norms.fisher_max))
    ranges = list(zip(low.tolist(), high.tolist(), strict=True))
    bounded = _with_columns(estimates, groups, columns, trace_range=ranges)
    jacobian_norms = frobenius.mean(-1).clamp(min=0).sqrt().tolist()
    spectral_norms = [None] * len(groups) if spectral is None else spectral.tolist()
    geometries = (
        Geometry(jacobian_norm=norm, jacobian_spectral_norm=spectral_norm)
        for norm, spectral_norm in zip(jacobian_norms, spectral_norms, strict=True)
    )
    return bounded, dict(zip(groups, geometries, strict=True))


def add_i2_bounds(
    measured: Measured,
    groups: Groups,
    estimates: Mapping[str, Estimate],
    gram: Tensor,
) -> dict[str, Estimate]:
    """Add to Î₂ the norms of its covariance, (18) and its sharper form, trace and diagonal bounds.

    Args:
        measured: The statistics of the batch, with ``norms`` and ``curvature``.
        groups: The parameters of each group.
        estimates: Î₂ of each group.
        gram: ⟨R_y, R_z⟩ of each group [J, G, B, n, n], or its diagonal [J, G, B, n].

    Returns:
        The estimates with their bounds.
    """
    norms, curvature = measured.norms, measured.curvature
    assert norms is not None and curvature is not None
    classes, draws = measured.moments["jacobian"].classes, curvature.draws
    full = gram.dim() == 5
    diagonal = gram.diagonal(dim1=-2, dim2=-1) if full else gram
    hessian_squares = hessian_norm_squares(diagonal, draws, curvature.exact, classes)  # [J, G, B, K]
    square = sharp_square = hessian_squares.mean((0, -1))
    random_signs = not curvature.exact or (classes is not None and draws > classes)
    columns: dict[str, Tensor | None] = {
        "bound": (square * norms.fisher_norm).mean(-1),
        "bound_error": _mean_error(hessian_squares * norms.fisher_norm.unsqueeze(-1), random_signs),
    }
    if curvature.exact and full:
        mean = gram.mean(0)
        # of several heads, unit vectors follow the labels
        has_units = classes is None and mean.shape[-1] > draws
        of_outputs = mean[..., draws:, draws:] if has_units else mean[..., :draws, :draws]
        mean = mean[..., :draws, :draws]
        centred = centre_classes(of_outputs, classes)
        # absolute values: the noise of the probes makes eigenvalues of a block negative, and then
        # covariance_norm, from the same probes, still does not exceed this bound
        largest = eigenvalues(centred).abs().amax(-1)
        sharp_square = centred.diagonal(dim1=-2, dim2=-1).sum(-1)
        columns["sharp_bound"] = (largest * norms.fisher_norm).mean(-1)
        inner = hessian_covariance_square(gram[..., :draws, :draws], curvature.weights)
        columns["covariance_norm"] = inner.clamp(min=0).sqrt().mean(-1)
        roots = curvature.weights.clamp(min=0).sqrt()
        weighted = mean * roots.unsqueeze(-1) * roots.unsqueeze(-2)
        columns["covariance_spectral_norm"] = largest_eigenvalue(weighted).mean(-1)
    columns["trace_bound"] = (sharp_square * norms.fisher_max).mean(-1)
    if curvature.exact and measured.spot_checks is None:
        squares = GroupSums.of(groups).sum(curvature.parameters, "square")
        entries = hessian_norm_squares(squares, draws, True, classes).mean(-1)
        columns["diagonal_bound"] = (entries * norms.fisher_max).mean(-1)
    return _with_columns(estimates, groups, columns)


def _with_columns(
    estimates: Mapping[str, Estimate],
    groups: Groups,
    columns: Mapping[str, Tensor | None],
    **lists: list[Any],
) -> dict[str, Estimate]:
    """Return the groups' estimates with further fields, each a tensor [G] or a list of G values."""
    replaced = {}
    names, rows = to_rows({**columns, **lists})
    for group, row in zip(groups, rows, strict=True):
        changes: dict[str, Any] = dict(zip(names, row, strict=False))
        if None in row:
            lost = [name for name, x in changes.items() if x is None]
            reasons = dict.fromkeys(lost, "not a finite number: eigenvalues leave float64's range")
            changes["unknown"] = {**estimates[group].unknown, **reasons}
        replaced[group] = estimates[group].changed(**changes)
    return replaced


def _covariance_columns(
    scores: MomentsBatch, group_sums: GroupSums, classes: int | None
) -> dict[str, Tensor | None]:
    """Return the norms of Cov Î₁ and the range bound of every group [G]; empty for drawn labels."""
    if scores.draws is not None or scores.square_weights is None or scores.quartic_weights is None:
        return {}
    assert scores.blocks is not None
    square, quartic = scores.square_weights.double(), scores.quartic_weights.double()
    columns: dict[str, Tensor | None] = {}
    if classes is not None and bool((scores.blocks == scores.blocks[0]).all()):
        _, q, _, top = group_sums.sum(scores.parameters, "powers").sum(-1).unbind(1)
        columns["diagonal_range_bound"] = (top - q) / scores.batch_size
    gram = group_sums.sum_known(scores.parameters, "gram")
    if gram is None and scores.square_weights.shape[1] == 1:
        gram = group_sums.sum(scores.parameters, "squared_norms").unsqueeze(-1)
    if gram is None:
        return columns
    norm = score_covariance_norm(gram, square, quartic, scores.blocks)
    spectral = score_covariance_spectral_norm(gram, square, quartic, scores.blocks)
    columns["covariance_norm"] = norm.mean(-1)
    columns["covariance_spectral_norm"] = None if spectral is None else spectral.mean(-1)
    return columns


def hessian_norm_squares(squares: Tensor, draws: int, exact: bool, classes: int | None) -> Tensor:
    """Return Σ_a ‖H_a‖² over the outputs a from ‖R‖² of ``curvature_cotangents``.

    Args:
        squares: ‖R‖² of every cotangent [..., n].
        draws: Number of cotangents that are label scores, the first of the n.
        exact: Whether labels were integrated over exactly.
        classes: Number of outputs that share one label (softmax); None for independent outputs.

    Returns:
        The sums [..., K]: one for each random sign vector, K = 1 without them.
    """
    more = squares[..., draws:]
    if not exact:
        return more
    if classes is None and more.shape[-1]:  # unit vectors follow the labels
        return more.sum(-1, keepdim=True)
    sums = squares[..., :draws].sum(-1, keepdim=True)
    return sums if classes is None else sums + (more[..., :1] - more[..., 1:]) / classes


def _mean_error(values: Tensor, random_signs: bool) -> Tensor | None:
    """Return the standard error [G] of means of values [J, G, B, K].

    All inputs share the J directions, and each input has K different sign vectors. The variance over
    inputs includes the noise of the signs (where these are random) and more. A direction changes
    all inputs together, so that a single direction does not show its noise.
    """
    variances = []
    directions, _, size, signs = values.shape
    if directions > 1:
        variances.append(values.mean((2, 3)).var(0) / directions)
    if random_signs and size > 1:
        variances.append(values.mean((0, 3)).var(-1) / size)
    elif random_signs and signs > 1:
        variances.append(values.mean((0, 2)).var(-1) / signs)
    return torch.stack(variances).sum(0).sqrt() if variances else None


def _num_signs(jacobian: MomentsBatch) -> int:
    """Return the number of random sign cotangents; the class means after them have no weight."""
    assert jacobian.blocks is not None
    return int((jacobian.blocks == 0).sum())


def _centred_squares(gram: Tensor, signs: int) -> Tensor:
    """Return ‖Jᵀ(u − ū1)‖² [B, K] from the Gram matrix of u_1 … u_K, ū_1 … ū_K [B, 2K, 2K]."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    cross = gram[..., :signs, signs:].diagonal(dim1=-2, dim2=-1)
    return diagonal[..., :signs] - 2 * cross + diagonal[..., signs:]
