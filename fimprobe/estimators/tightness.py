"""Bounds and covariance norms of every group of parameters, added to its estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fimprobe.estimators.bounds import (
    centre_classes,
    hessian_covariance_square,
    largest_eigenvalue,
    score_covariance_norm,
    score_covariance_spectral_norm,
    square_of_mean,
)
from fimprobe.types import Estimate, Geometry, Measured, MomentsBatch


def bound_scores(
    measured: Measured, groups: Mapping[str, list[str]], estimates: Mapping[str, Estimate]
) -> tuple[dict[str, Estimate], dict[str, Geometry]]:
    """Î₁ with ‖Cov Î₁‖, (17), its sharper forms, the trace and the diagonal bounds."""
    norms, jacobian = measured.norms, measured.moments["jacobian"]
    scores = measured.moments["i1"]
    assert norms is not None
    exact = scores.draws is None  # then the seeds are unit vectors
    bounded, geometry = {}, {}
    for group, names in groups.items():
        new: dict[str, Any] = {}
        square = _sum(jacobian, names, "squared_norms")
        gram = _sum(jacobian, names, "gram")
        if gram is None and square.shape[-1] == 1:
            gram = square.unsqueeze(-1)
        if exact:
            frobenius = square.sum(-1)
            fourth, error = frobenius.square(), None
            low_fourth = None
            spectral = None
            if gram is not None:
                centred = centre_classes(gram, jacobian.classes)
                top = largest_eigenvalue(centred)
                low_fourth = top.square()
                spectral = float(largest_eigenvalue(gram).mean()) ** 0.5
        else:
            count = _signs(jacobian)
            frobenius = square[:, :count].mean(-1)
            fourth, variance = square_of_mean(square[:, :count])
            error = float((variance * norms.moment_norm.square()).sum().sqrt() / len(variance))
            low_fourth, spectral = None, None
            if gram is not None and gram.shape[-1] == 2 * count:
                low = _without_mean(gram, count)
                low_fourth = square_of_mean(low)[0]
        new["bound"] = float((fourth * norms.moment_norm).mean())
        new["bound_error"] = error
        sharp = fourth if low_fourth is None else low_fourth
        new["sharp_bound"] = float((sharp * norms.moment_norm).mean())
        new["trace_bound"] = float((sharp * norms.moment_trace).mean())
        parts = [jacobian.parameters[n] for n in names]
        if exact:
            new["diagonal_bound"] = sum(p.q_sum for p in parts) / jacobian.batch_size
        else:
            count = _signs(jacobian)
            total = sum(p.q_sum - p.a4_sum for p in parts)
            new["diagonal_bound"] = total / (count * (count - 1)) / jacobian.batch_size
        new["trace_range"] = (
            float((frobenius * norms.fisher_min).mean()),
            float((frobenius * norms.fisher_max).mean()),
        )
        new |= _covariance(scores, names, jacobian.classes)
        bounded[group] = dataclasses.replace(estimates[group], **new)
        geometry[group] = Geometry(max(float(frobenius.mean()), 0.0) ** 0.5, spectral)
    return bounded, geometry


def bound_hessians(
    measured: Measured,
    groups: Mapping[str, list[str]],
    estimates: Mapping[str, Estimate],
    grams: Mapping[str, Tensor],
) -> dict[str, Estimate]:
    """Î₂ with ‖Cov Î₂‖_F, (18), its sharper form, the trace and the diagonal bounds."""
    norms, curvature = measured.norms, measured.curvature
    assert norms is not None and curvature is not None
    classes, draws = measured.moments["jacobian"].classes, curvature.draws
    bounded = {}
    for group, names in groups.items():
        new: dict[str, Any] = {}
        gram = grams[group]
        own = gram.diagonal(dim1=-2, dim2=-1) if gram.dim() == 4 else gram  # [J, B, n]
        each = _of_outputs(own, draws, curvature.exact, classes)  # [J, B, K]: ‖H‖²
        square = each.mean((0, 2))
        new["bound"] = float((square * norms.fisher_norm).mean())
        random = not curvature.exact or (classes is not None and draws > classes)
        new["bound_error"] = _error(each * norms.fisher_norm.unsqueeze(-1), random)
        low = square
        if curvature.exact and gram.dim() == 4:
            mean = gram.mean(0)[..., :draws, :draws]
            centred = centre_classes(mean, classes)
            # by size: noise of the probes bends eigenvalues of a block below zero, and with them the
            # norm, taken from the same probes, never exceeds this bound
            top = torch.linalg.eigvalsh(centred).abs().amax(-1)
            low = centred.diagonal(dim1=-2, dim2=-1).sum(-1)
            new["sharp_bound"] = float((top * norms.fisher_norm).mean())
            inner = hessian_covariance_square(gram[..., :draws, :draws], curvature.weights)
            new["covariance_norm"] = float(inner.clamp(min=0).sqrt().mean())
            root = curvature.weights.clamp(min=0).sqrt()
            weighed = mean * root.unsqueeze(-1) * root.unsqueeze(-2)
            new["covariance_spectral_norm"] = float(largest_eigenvalue(weighed).mean())
        new["trace_bound"] = float((low * norms.fisher_max).mean())
        if curvature.exact:
            squares = torch.stack([curvature.parameters[n].square for n in names]).sum(0)
            square = _of_outputs(squares, draws, True, classes).mean(-1)
            new["diagonal_bound"] = float((square * norms.fisher_max).mean())
        bounded[group] = dataclasses.replace(estimates[group], **new)
    return bounded


def _covariance(scores: MomentsBatch, names: list[str], classes: int | None) -> dict[str, Any]:
    gram = _sum(scores, names, "gram")
    if scores.draws is not None or scores.second is None or scores.fourth is None:
        return {}
    assert scores.blocks is not None
    second, fourth = scores.second.double(), scores.fourth.double()
    found: dict[str, Any] = {}
    if classes is not None and bool((scores.blocks == scores.blocks[0]).all()):
        parts = [scores.parameters[n] for n in names]
        found["diagonal_range_bound"] = sum(p.top_sum - p.q_sum for p in parts) / scores.batch_size
    if gram is None and scores.second.shape[1] == 1:
        gram = _sum(scores, names, "squared_norms").unsqueeze(-1)
    if gram is None:
        return found
    found["covariance_norm"] = float(
        score_covariance_norm(gram, second, fourth, scores.blocks).mean()
    )
    top = score_covariance_spectral_norm(gram, second, fourth, scores.blocks)
    found["covariance_spectral_norm"] = None if top is None else float(top.mean())
    return found


def _of_outputs(squares: Tensor, draws: int, exact: bool, classes: int | None) -> Tensor:
    """Σ_a ‖H_a‖² [..., K] of the outputs a, from ‖R‖² [..., n] of ``curvature_seeds``."""
    more = squares[..., draws:]
    if not exact:
        return more
    found = squares[..., :draws].sum(-1, keepdim=True)
    return found if classes is None else found + (more[..., :1] - more[..., 1:]) / classes


def _error(values: Tensor, random: bool) -> float | None:
    """Standard error of the mean of values [J, B, K]: J directions for all inputs, K signs for each.

    The spread over inputs has the signs' part (where they are ``random``) and more; a direction
    moves all inputs together, and the spread over a single one is not known.
    """
    parts = []
    directions, size, signs = values.shape
    if directions > 1:
        parts.append(values.mean((1, 2)).var() / directions)
    if random and size > 1:
        parts.append(values.mean((0, 2)).var() / size)
    elif random and signs > 1:
        parts.append(values.mean((0, 1)).var() / signs)
    return float(torch.stack(parts).sum().sqrt()) if parts else None


def _signs(jacobian: MomentsBatch) -> int:
    """Random sign seeds, those with a weight; means over classes may stand behind them."""
    assert jacobian.blocks is not None
    return int((jacobian.blocks == 0).sum())


def _without_mean(gram: Tensor, count: int) -> Tensor:
    """‖Jᵀ(u − ū1)‖² [B, K] from the Gram matrix of u_1 … u_K, ū_1 … ū_K."""
    own = gram.diagonal(dim1=-2, dim2=-1)
    between = gram[..., :count, count:].diagonal(dim1=-2, dim2=-1)
    return own[..., :count] - 2 * between + own[..., count:]


def _sum(moments: MomentsBatch, names: list[str], what: str) -> Any:
    parts = [getattr(moments.parameters[n], what) for n in names]
    if any(p is None for p in parts):
        return None
    return torch.stack(parts).sum(0).double().cpu()
