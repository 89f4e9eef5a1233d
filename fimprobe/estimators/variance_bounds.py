"""Bounds and covariance norms of every group of parameters, added to its estimates."""

from __future__ import annotations

import dataclasses
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
from fimprobe.estimators.estimate import Estimate, Geometry
from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.statistics import Measured, MomentsBatch


def add_i1_bounds(
    measured: Measured, groups: Groups, estimates: Mapping[str, Estimate]
) -> tuple[dict[str, Estimate], dict[str, Geometry]]:
    """Î₁ with ‖Cov Î₁‖, (17), its sharper forms, the trace and the diagonal bounds."""
    norms, jacobian = measured.norms, measured.moments["jacobian"]
    scores = measured.moments["i1"]
    assert norms is not None
    exact = scores.draws is None  # then the seeds are unit vectors
    size = jacobian.batch_size
    members = GroupSums(groups)
    square = members.sum(jacobian.parameters, "squared_norms")
    gram = members.sum_known(jacobian.parameters, "gram")
    a4, q, _, _ = members.sum(jacobian.parameters, "powers").sum(-1).unbind(1)
    if gram is None and square.shape[-1] == 1:
        gram = square.unsqueeze(-1)
    low_fourth, spectral, error = None, None, None
    if exact:
        frobenius = square.sum(-1)
        fourth = frobenius.square()
        diagonal = q / size
        if gram is not None:
            low_fourth = largest_eigenvalue(centre_classes(gram, jacobian.classes)).square()
            spectral = largest_eigenvalue(gram).mean(-1).sqrt()
    else:
        count = _signs(jacobian)
        frobenius = square[..., :count].mean(-1)
        fourth, variance = square_of_mean(square[..., :count])
        error = (variance * norms.moment_norm.square()).sum(-1).sqrt() / size
        diagonal = (q - a4) / (count * (count - 1)) / size
        if gram is not None and gram.shape[-1] == 2 * count:
            low_fourth = square_of_mean(_without_mean(gram, count))[0]
    sharp = fourth if low_fourth is None else low_fourth
    columns = {
        "bound": (fourth * norms.moment_norm).mean(-1),
        "bound_error": error,
        "sharp_bound": (sharp * norms.moment_norm).mean(-1),
        "trace_bound": (sharp * norms.moment_trace).mean(-1),
        "diagonal_bound": diagonal,
        **_covariance(scores, members, jacobian.classes),
    }
    low, high = ((frobenius * of).mean(-1) for of in (norms.fisher_min, norms.fisher_max))
    ranges = list(zip(low.tolist(), high.tolist(), strict=True))
    bounded = _replaced(estimates, groups, columns, trace_range=ranges)
    roots = frobenius.mean(-1).clamp(min=0).sqrt().tolist()
    tops = [None] * len(groups) if spectral is None else spectral.tolist()
    shapes = (Geometry(root, top) for root, top in zip(roots, tops, strict=True))
    return bounded, dict(zip(groups, shapes, strict=True))


def add_i2_bounds(
    measured: Measured,
    groups: Groups,
    estimates: Mapping[str, Estimate],
    grams: Mapping[str, Tensor],
) -> dict[str, Estimate]:
    """Î₂ with ‖Cov Î₂‖_F, (18), its sharper form, the trace and the diagonal bounds."""
    norms, curvature = measured.norms, measured.curvature
    assert norms is not None and curvature is not None
    classes, draws = measured.moments["jacobian"].classes, curvature.draws
    gram = torch.stack([grams[group] for group in groups], 1)  # [J, G, B, n, n]
    full = gram.dim() == 5
    own = gram.diagonal(dim1=-2, dim2=-1) if full else gram
    each = _of_outputs(own, draws, curvature.exact, classes)  # [J, G, B, K]: ‖H‖²
    square = low = each.mean((0, -1))
    random = not curvature.exact or (classes is not None and draws > classes)
    columns: dict[str, Tensor | None] = {
        "bound": (square * norms.fisher_norm).mean(-1),
        "bound_error": _error(each * norms.fisher_norm.unsqueeze(-1), random),
    }
    if curvature.exact and full:
        mean = gram.mean(0)[..., :draws, :draws]
        centred = centre_classes(mean, classes)
        # by size: noise of the probes bends eigenvalues of a block below zero, and with them the
        # norm, taken from the same probes, never exceeds this bound
        top = eigenvalues(centred).abs().amax(-1)
        low = centred.diagonal(dim1=-2, dim2=-1).sum(-1)
        columns["sharp_bound"] = (top * norms.fisher_norm).mean(-1)
        inner = hessian_covariance_square(gram[..., :draws, :draws], curvature.weights)
        columns["covariance_norm"] = inner.clamp(min=0).sqrt().mean(-1)
        root = curvature.weights.clamp(min=0).sqrt()
        weighed = mean * root.unsqueeze(-1) * root.unsqueeze(-2)
        columns["covariance_spectral_norm"] = largest_eigenvalue(weighed).mean(-1)
    columns["trace_bound"] = (low * norms.fisher_max).mean(-1)
    if curvature.exact:
        squares = GroupSums(groups).sum(curvature.parameters, "square")
        entries = _of_outputs(squares, draws, True, classes).mean(-1)
        columns["diagonal_bound"] = (entries * norms.fisher_max).mean(-1)
    return _replaced(estimates, groups, columns)


def _replaced(
    estimates: Mapping[str, Estimate],
    groups: Groups,
    columns: Mapping[str, Tensor | None],
    **lists: list[Any],
) -> dict[str, Estimate]:
    """The groups' estimates with further fields, each a tensor [G] or a list."""
    values: dict[str, list[Any]] = {n: c.tolist() for n, c in columns.items() if c is not None}
    values |= lists
    found = {}
    for row, group in enumerate(groups):
        mine = {name: of[row] for name, of in values.items()}
        lost = [name for name, x in mine.items() if isinstance(x, float) and x != x]
        mine |= dict.fromkeys(lost)
        reasons = dict.fromkeys(lost, "not a finite number: eigenvalues leave float64's range")
        unknown = {**estimates[group].unknown, **reasons}
        found[group] = dataclasses.replace(estimates[group], **mine, unknown=unknown)
    return found


def _covariance(
    scores: MomentsBatch, members: GroupSums, classes: int | None
) -> dict[str, Tensor | None]:
    if scores.draws is not None or scores.second is None or scores.fourth is None:
        return {}
    assert scores.blocks is not None
    second, fourth = scores.second.double(), scores.fourth.double()
    found: dict[str, Tensor | None] = {}
    if classes is not None and bool((scores.blocks == scores.blocks[0]).all()):
        _, q, _, top = members.sum(scores.parameters, "powers").sum(-1).unbind(1)
        found["diagonal_range_bound"] = (top - q) / scores.batch_size
    gram = members.sum_known(scores.parameters, "gram")
    if gram is None and scores.second.shape[1] == 1:
        gram = members.sum(scores.parameters, "squared_norms").unsqueeze(-1)
    if gram is None:
        return found
    found["covariance_norm"] = score_covariance_norm(gram, second, fourth, scores.blocks).mean(-1)
    norm = score_covariance_spectral_norm(gram, second, fourth, scores.blocks)
    found["covariance_spectral_norm"] = None if norm is None else norm.mean(-1)
    return found


def _of_outputs(squares: Tensor, draws: int, exact: bool, classes: int | None) -> Tensor:
    """Σ_a ‖H_a‖² [..., K] of the outputs a, from ‖R‖² [..., n] of ``curvature_cotangents``."""
    more = squares[..., draws:]
    if not exact:
        return more
    found = squares[..., :draws].sum(-1, keepdim=True)
    return found if classes is None else found + (more[..., :1] - more[..., 1:]) / classes


def _error(values: Tensor, random: bool) -> Tensor | None:
    """Standard error [G] of means of values [J, G, B, K]: J directions for all inputs, K signs each.

    The spread over inputs has the signs' part (where they are ``random``) and more; a direction
    moves all inputs together, and the spread over a single one is not known.
    """
    parts = []
    directions, _, size, signs = values.shape
    if directions > 1:
        parts.append(values.mean((2, 3)).var(0) / directions)
    if random and size > 1:
        parts.append(values.mean((0, 3)).var(-1) / size)
    elif random and signs > 1:
        parts.append(values.mean((0, 2)).var(-1) / signs)
    return torch.stack(parts).sum(0).sqrt() if parts else None


def _signs(jacobian: MomentsBatch) -> int:
    """Random sign seeds, those with a weight; means over classes may stand behind them."""
    assert jacobian.blocks is not None
    return int((jacobian.blocks == 0).sum())


def _without_mean(gram: Tensor, count: int) -> Tensor:
    """‖Jᵀ(u − ū1)‖² [B, K] from the Gram matrix of u_1 … u_K, ū_1 … ū_K."""
    own = gram.diagonal(dim1=-2, dim2=-1)
    between = gram[..., :count, count:].diagonal(dim1=-2, dim2=-1)
    return own[..., :count] - 2 * between + own[..., count:]
