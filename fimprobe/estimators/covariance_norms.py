"""Norms of the covariance tensors, and the bounds on them, from small Gram matrices per input.

Nothing here is P×P: Γ_yz = g_y·g_z, S_yz = ⟨R_y, R_z⟩ and (JJᵀ)_ab hold all that is needed.
Tensors have any leading dimensions (groups, inputs), then n×n for n seeds. Source: Soen & Sun (2021),
eq. 12 to 18; Soen & Sun (2024) for the diagonal; docs/theory.md, "Norms from Gram matrices".
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 6
"""Passes up to which λ_max of a covariance over several labels is found densely."""


def score_covariance_norm(gram: Tensor, second: Tensor, fourth: Tensor, blocks: Tensor) -> Tensor:
    """‖Cov Î₁‖_F of one label draw, from Γ [..., n, n] of exact passes.

    One label: √Σ p_y p_z G̃_yz² with G = Γ∘Γ centred by p. Several independent labels (blocks):
    Cov = Σ_t Cov_t + Σ_{s≠t} (F_s⊗F_t)(1 + swap). A block is the labels of one variable, weighted
    with their probabilities, or a single pass of variance v and fourth moment m, whose Cov_t is
    (m − v²) g⊗g⊗g⊗g. Nothing large is subtracted: at Bernoulli's p = ½ m − v² vanishes.

    >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # g = ±1 with odds ½: g² never varies
    >>> half = torch.tensor([0.5, 0.5])
    >>> score_covariance_norm(gram, half, half, torch.zeros(2)).item()
    0.0
    """
    member = _members(blocks, gram)
    single = member.shape[0] == member.shape[1]
    weight = (fourth - second.square()).clamp(min=0) if single else second
    own = gram.square() if single else _centred(gram, second, member)
    total = (weight.unsqueeze(-1) * weight.unsqueeze(-2) * own.square()).sum((-2, -1))
    if member.shape[1] == 1:
        return total.sqrt()
    same = member @ member.T
    root = second.sqrt()
    x = gram * root.unsqueeze(-1) * root.unsqueeze(-2)  # F in the coordinates of the passes
    # of Σ_{s≠t}: Σ_{s≠t, u≠v} ⟨F_s, F_u⟩⟨F_t, F_v⟩ + tr(F_s F_u F_t F_v)
    apart = 1 - torch.eye(member.shape[1], dtype=gram.dtype, device=gram.device)
    products = member.T @ x.square() @ member
    paths = x.unsqueeze(-2) * x.unsqueeze(-3)
    turns = (paths @ (1 - same) * paths).sum(-1)
    total = total + 2 * (products * (apart @ products @ apart)).sum((-2, -1))
    total = total + 2 * (turns * (1 - same)).sum((-2, -1))
    # between the two: Σ_{u≠v} E (gᵀF_u g)(gᵀF_v g) less tr(F_t F_u F_t F_v)
    inner = (gram.square() * second.unsqueeze(-2)) @ member
    crossed = (weight * (inner @ apart * inner).sum(-1)).sum(-1)
    if not single:
        crossed = crossed - (turns * same).sum((-2, -1))
    return (total + 4 * crossed).clamp(min=0).sqrt()


def score_covariance_spectral_norm(
    gram: Tensor, second: Tensor, fourth: Tensor, blocks: Tensor
) -> Tensor | None:
    """‖Cov Î₁‖_op = λ_max(D^½ G̃ D^½) for one label; dense for few passes; else None."""
    member = _members(blocks, gram)
    n, count = member.shape
    if count == 1 < n:
        root = second.sqrt()
        matrix = _centred(gram, second, member) * root.unsqueeze(-1) * root.unsqueeze(-2)
        return largest_eigenvalue(matrix)
    if n > SMALL:
        return None
    values, vectors = torch.linalg.eigh(gram)
    g = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # g_s in an orthonormal basis
    outer = g.unsqueeze(-1) * g.unsqueeze(-2)
    each = torch.einsum("...s,st,...sij->...tij", second, member, outer)
    if n == count:
        weight = (fourth - second.square()).clamp(min=0)
    else:
        weight = second
        outer = outer - torch.einsum("st,...tij->...sij", member, each)
    covariance = torch.einsum("...s,...sij,...skl->...ijkl", weight, outer, outer)
    others = each.sum(-3, keepdim=True) - each if count > 1 else torch.zeros_like(each)
    for form in ("...tik,...tjl->...ijkl", "...til,...tjk->...ijkl"):
        covariance = covariance + torch.einsum(form, each, others)
    return largest_eigenvalue(covariance.reshape(*gram.shape[:-2], n * n, n * n))


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
    return eigenvalues(gram)[..., -1].clamp(min=0)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Of symmetric matrices, ascending; NaN of those that LAPACK cannot tell: not finite, or tiny."""
    size = matrix.abs().amax((-2, -1), keepdim=True)
    known = torch.isfinite(size) & (size > 0)
    scaled = torch.where(known, matrix / size.where(known, 1), 0)
    try:
        found = torch.linalg.eigvalsh(scaled)
    except torch.linalg.LinAlgError:
        found = torch.full_like(scaled[..., 0], torch.nan)
    return (found * size.squeeze(-1)).masked_fill(~torch.isfinite(size.squeeze(-1)), torch.nan)


def square_of_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """The unbiased square of E v from K ≥ 2 probes v [..., K], and its standard error squared.

    >>> square_of_mean(torch.tensor([2.0, 3.0]))[0].item()
    6.0
    """
    count = values.shape[-1]
    square = (values.sum(-1).square() - values.square().sum(-1)) / (count * (count - 1))
    # to first order: Var = 4 (E v)² Var v / K
    return square, 4 * values.mean(-1).square() * values.var(-1) / count


def _centred(gram: Tensor, weight: Tensor, member: Tensor) -> Tensor:
    """⟨g_y g_yᵀ − F_t, g_z g_zᵀ − F_u⟩, y a label of variable t and z of u."""
    g = gram.square()
    mean = ((g * weight.unsqueeze(-2)) @ member) @ member.T  # over the labels of z's variable
    whole = member @ (member.T @ (mean * weight.unsqueeze(-1)))
    return g - mean - mean.transpose(-1, -2) + whole


def _members(blocks: Tensor, like: Tensor) -> Tensor:
    """Which pass belongs to which variable: 0 and 1 [n, T]."""
    return torch.nn.functional.one_hot(blocks.long()).to(like.dtype)
