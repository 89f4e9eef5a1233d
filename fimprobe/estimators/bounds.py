"""Norms of the covariance tensors, and the bounds on them, from small Gram matrices per input.

Nothing here is P×P: Γ_yz = g_y·g_z, S_yz = ⟨R_y, R_z⟩ and (JJᵀ)_ab hold all that is needed.
Tensors have any leading dimensions (groups, inputs), then n×n for n seeds. Source: Soen & Sun 2021,
eq. (12)–(18); Soen & Sun 2024 for the diagonal; theory.md §3, §4, §6.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 6
"""Passes up to which λ_max of a covariance over several labels is found densely."""


def score_covariance_norm(gram: Tensor, second: Tensor, fourth: Tensor, blocks: Tensor) -> Tensor:
    """‖Cov Î₁‖_F of one label draw, from Γ [..., n, n] of exact passes.

    One label: √Σ p_y p_z G̃_yz² with G = Γ∘Γ centred by p. Several independent labels (blocks):
    fourth cumulants add, Cov = Σ_t C_t + (F⊗F)(1 + swap).

    >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # g = ±1 with odds ½: g² never varies
    >>> half = torch.tensor([0.5, 0.5])
    >>> score_covariance_norm(gram, half, half, torch.zeros(2)).item()
    0.0
    """
    if _one_label(second, fourth, blocks):
        centred = _centred(gram, second)
        return (second.unsqueeze(-1) * second.unsqueeze(-2) * centred.square()).sum((-2, -1)).sqrt()
    member = torch.nn.functional.one_hot(blocks.long()).to(gram.dtype)
    root = second.sqrt()
    x = gram * root.unsqueeze(-1) * root.unsqueeze(-2)  # F in the coordinates of the passes
    parts = [x * member[:, t].unsqueeze(-1) for t in range(member.shape[1])]  # P_t X
    inner = torch.einsum("...su,...u,ut->...st", gram.square(), second, member)  # g_sᵀ F_t g_s
    quartic = torch.einsum("...s,...st,...t->...", fourth, gram.pow(4), fourth)
    crossed = (fourth.unsqueeze(-1) * inner.square()).sum((-2, -1))
    total = quartic - 6 * crossed
    whole = inner.sum(-1)
    fisher_square = x.square().sum((-2, -1))
    fourth_power = (x @ x).square().sum((-2, -1))
    norms = torch.stack([torch.stack([_trace(a, b) for b in parts], -1) for a in parts], -2)
    cycles = torch.stack([torch.stack([_trace(a @ b, a @ b) for b in parts], -1) for a in parts], -2)
    total = total + (3 * norms.square() + 6 * cycles).sum((-2, -1))
    mixed = 2 * (fourth * whole.square()).sum(-1)
    mixed = mixed - sum(2 * _trace(a, x).square() + 4 * _trace(a @ x, a @ x) for a in parts)
    total = total + 2 * mixed + 2 * fisher_square.square() + 2 * fourth_power
    return total.clamp(min=0).sqrt()


def score_covariance_spectral_norm(
    gram: Tensor, second: Tensor, fourth: Tensor, blocks: Tensor
) -> Tensor | None:
    """‖Cov Î₁‖_op = λ_max(D^½ G̃ D^½) for one label; dense for few passes; else None."""
    if _one_label(second, fourth, blocks):
        root = second.sqrt()
        matrix = _centred(gram, second) * root.unsqueeze(-1) * root.unsqueeze(-2)
        return torch.linalg.eigvalsh(matrix)[..., -1]
    n = gram.shape[-1]
    if n > SMALL:
        return None
    values, vectors = torch.linalg.eigh(gram)
    g = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # g_s in an orthonormal basis
    member = torch.nn.functional.one_hot(blocks.long()).to(gram.dtype)
    covariance = torch.einsum("...s,...si,...sj,...sk,...sl->...ijkl", fourth, g, g, g, g)
    each = torch.einsum("...s,st,...si,...sj->...tij", second, member, g, g)
    for form in ("...tij,...tkl->...ijkl", "...tik,...tjl->...ijkl", "...til,...tjk->...ijkl"):
        covariance = covariance - torch.einsum(form, each, each)
    fisher = each.sum(-3)
    for form in ("...ik,...jl->...ijkl", "...il,...jk->...ijkl"):
        covariance = covariance + torch.einsum(form, fisher, fisher)
    return torch.linalg.eigvalsh(covariance.reshape(*gram.shape[:-2], n * n, n * n))[..., -1]


def hessian_covariance_square(grams: Tensor, second: Tensor) -> Tensor:
    """‖Cov Î₂‖_F² = Σ w_y w_z S_yz² from S [J, ..., n, n] of J independent probes (exact: J = 1).

    Unbiased for J ≥ 2: products of different probes only, so that it may be negative.
    """
    weight = second.unsqueeze(-1) * second.unsqueeze(-2)
    count = grams.shape[0]
    square = grams.sum(0).square() - (grams.square().sum(0) if count > 1 else 0)
    return (weight * square).sum((-2, -1)) / (count * (count - 1) if count > 1 else 1)


def centre_classes(gram: Tensor, classes: int | None) -> Tensor:
    """(I − 11ᵀ/C) Γ (I − 11ᵀ/C) for each position's C outputs: softmax does not see the mean."""
    if classes is None:
        return gram
    n = gram.shape[-1]
    shape = (*gram.shape[:-2], n // classes, classes, n // classes, classes)
    x = gram.reshape(shape)
    x = x - x.mean(-1, keepdim=True)
    return (x - x.mean(-3, keepdim=True)).reshape(gram.shape)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """λ_max: the square of s_max(J) for Γ = JJᵀ."""
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)


def square_of_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """The unbiased square of E v from K ≥ 2 probes v [..., K], and its standard error squared.

    >>> square_of_mean(torch.tensor([2.0, 3.0]))[0].item()
    6.0
    """
    count = values.shape[-1]
    square = (values.sum(-1).square() - values.square().sum(-1)) / (count * (count - 1))
    # to first order: Var = 4 (E v)² Var v / K
    return square, 4 * values.mean(-1).square() * values.var(-1) / count


def _centred(gram: Tensor, weight: Tensor) -> Tensor:
    g = gram.square()
    mean = (g * weight.unsqueeze(-2)).sum(-1)
    whole = (mean * weight).sum(-1)
    return g - mean.unsqueeze(-1) - mean.unsqueeze(-2) + whole.unsqueeze(-1).unsqueeze(-1)


def _one_label(second: Tensor, fourth: Tensor, blocks: Tensor) -> bool:
    """Whether the passes are the labels of one variable, weighted with their probabilities."""
    return bool((blocks == blocks[0]).all()) and torch.equal(second, fourth)


def _trace(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.transpose(-1, -2)).sum((-2, -1))
