"""Norms of I(h) and M for several positions whose labels are independent given the input."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms


def combine(positions: OutputNorms, mask: Tensor | None = None) -> OutputNorms:
    """Norms per input [B] from those of each of its positions [B, T]; docs/theory.md, "Sequences".

    δ = (δ_1, …, δ_T) has independent parts of mean zero. I is block diagonal:
    ‖I‖² = Σ‖I_t‖², tr I = Σ tr I_t, λ_max(I) = max λ_max(I_t), λ_min(I) = min λ_min(I_t).
    M = Cov(vec δδᵀ) falls apart into the M_t and, for each pair s < t, [1 1; 1 1]⊗(I_s⊗I_t) up to
    an orthogonal change of basis, as δ_sδ_tᵀ and its transpose both occur:
    ‖M‖² = Σ‖M_t‖² + 2 Σ_{s≠t}‖I_s‖²‖I_t‖², tr M = Σ tr M_t + Σ_{s≠t} tr I_s tr I_t,
    λ_max(M) = max{λ_max(M_t), 2 λ_max(I_s) λ_max(I_t) for s ≠ t}.
    Upper bounds on the λ_max of the positions give upper bounds.

    Args:
        positions: the seven values, each [B, T].
        mask: bool, [B, T] or the labels' shape; False leaves a position out.

    >>> one = torch.ones(1, 2)
    >>> combine(OutputNorms(one, one, one, one, one, one, one)).moment_trace
    tensor([4.])
    """
    keep = position_mask(mask, positions.fisher_norm)
    fisher_norm, fisher_trace, fisher_max, moment_norm, moment_trace, moment_max = (
        x.where(keep, 0)
        for x in (
            positions.fisher_norm,
            positions.fisher_trace,
            positions.fisher_max,
            positions.moment_norm,
            positions.moment_trace,
            positions.moment_max,
        )
    )
    square = fisher_norm.square()
    largest = fisher_max.topk(min(2, fisher_max.shape[1])).values
    pair = 2 * largest.prod(1) if largest.shape[1] == 2 else torch.zeros_like(largest[:, 0])
    smallest = positions.fisher_min.where(keep, torch.inf).amin(1)
    return OutputNorms(
        fisher_norm=square.sum(1).sqrt(),
        fisher_trace=fisher_trace.sum(1),
        fisher_max=largest[:, 0],
        fisher_min=smallest.where(keep.any(1), 0),
        moment_norm=(moment_norm.square().sum(1) + 2 * _pairs(square)).sqrt(),
        moment_trace=moment_trace.sum(1) + _pairs(fisher_trace),
        moment_max=torch.maximum(moment_max.amax(1), pair),
    )


def position_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as bool [B, T], T positions as ``like`` has; all True for None."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if mask.shape[:1] != like.shape[:1] or mask.numel() != like.numel():
        raise FimprobeError(
            f"mask has shape {tuple(mask.shape)}, but there are {like.shape[1]} labels for each of "
            f"{like.shape[0]} inputs; pass a boolean mask shaped like the labels"
        )
    return mask.reshape(like.shape).bool()


def _pairs(x: Tensor) -> Tensor:
    """Σ_{s≠t} x_s x_t of x [B, T], as a sum of products: (Σx)² − Σx² would cancel."""
    before = x.cumsum(1)[:, :-1]
    return 2 * (before * x[:, 1:]).sum(1)
