"""Norms of I(h) and M for several positions whose labels are independent given the input."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms


def combine_positions(positions: OutputNorms, mask: Tensor | None = None) -> OutputNorms:
    """Return the norms of every input [B] from those of its positions [B, T].

    The score δ = (δ_1, …, δ_T) has independent blocks of mean zero (docs/theory.md, "Sequences").
    I is block diagonal: ‖I‖² = Σ‖I_t‖², tr I = Σ tr I_t, λ_max(I) = max λ_max(I_t),
    λ_min(I) = min λ_min(I_t).

    M = Cov(vec δδᵀ) is block diagonal in an orthogonal basis: one block M_t for each position, and
    [1 1; 1 1]⊗(I_s⊗I_t) for each pair s < t, because δ_sδ_tᵀ and its transpose both occur:
    ‖M‖² = Σ‖M_t‖² + 2 Σ_{s≠t}‖I_s‖²‖I_t‖², tr M = Σ tr M_t + Σ_{s≠t} tr I_s tr I_t,
    λ_max(M) = max{λ_max(M_t), 2 λ_max(I_s) λ_max(I_t) for s ≠ t}.
    Upper bounds on λ_max of the positions yield upper bounds.

    Args:
        positions: Norms of single positions, each [B, T].
        mask: Bool, [B, T] or of the labels' shape; False leaves a position out.

    >>> ones = {field.name: torch.ones(1, 2) for field in dataclasses.fields(OutputNorms)}
    >>> combine_positions(OutputNorms(**ones)).moment_trace
    tensor([4.])
    """
    keep = position_mask(mask, positions.fisher_norm)
    kept = {f.name: getattr(positions, f.name).where(keep, 0) for f in dataclasses.fields(positions)}
    square = kept["fisher_norm"].square()
    fisher_max = kept["fisher_max"]
    largest = fisher_max.topk(min(2, fisher_max.shape[1])).values
    pair = 2 * largest.prod(1) if largest.shape[1] == 2 else torch.zeros_like(largest[:, 0])
    smallest = positions.fisher_min.where(keep, torch.inf).amin(1)
    return OutputNorms(
        fisher_norm=square.sum(1).sqrt(),
        fisher_trace=kept["fisher_trace"].sum(1),
        fisher_max=largest[:, 0],
        fisher_min=smallest.where(keep.any(1), 0),
        moment_norm=(kept["moment_norm"].square().sum(1) + 2 * _pairs(square)).sqrt(),
        moment_trace=kept["moment_trace"].sum(1) + _pairs(kept["fisher_trace"]),
        moment_max=torch.maximum(kept["moment_max"].amax(1), pair),
    )


def position_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask as bool [B, T], the shape of ``like``; all True for None.

    Args:
        mask: Of the labels' shape, or None.
        like: A value for each position [B, T].

    Raises:
        FimprobeError: If the mask has another number of positions or inputs.
    """
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if mask.shape[:1] != like.shape[:1] or mask.numel() != like.numel():
        raise FimprobeError(
            f"mask must have the labels' shape, {like.shape[1]} labels for each of {like.shape[0]} "
            f"inputs, got {tuple(mask.shape)}. Pass a boolean mask, False where there is no label."
        )
    return mask.reshape(like.shape).bool()


def _pairs(x: Tensor) -> Tensor:
    """Return Σ_{s≠t} x_s x_t of x [B, T] as a sum of products: (Σx)² − Σx² would cancel."""
    before = x.cumsum(1)[:, :-1]
    return 2 * (before * x[:, 1:]).sum(1)
