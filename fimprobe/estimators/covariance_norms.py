"""Norms of the covariance tensors, and of the bounds on them, from small Gram matrices per input.

No P×P matrix is built: Γ_yz = g_y·g_z, S_yz = ⟨R_y, R_z⟩ and (JJᵀ)_ab determine every norm. Tensors
have any leading dimensions (groups, inputs), then [n, n] for n cotangents. See Soen & Sun (2021),
eq. 12 to 18, Soen & Sun (2024) for the diagonal, and docs/theory.md, "Norms from Gram matrices".
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DENSE_PASSES = 6
"""Number of passes up to which λ_max of a covariance over several labels is computed densely: the
matrix has n⁴ entries for each input."""


def score_covariance_norm(
    gram: Tensor, square_weights: Tensor, quartic_weights: Tensor, blocks: Tensor
) -> Tensor:
    """Return ‖Cov Î₁‖_F of one label draw from the Gram matrix of exact passes.

    For one label it is √Σ p_y p_z G̃_yz² with G = Γ∘Γ centred by p. Several independent labels
    (blocks) give Cov = Σ_t Cov_t + Σ_{s≠t} (F_s⊗F_t)(1 + swap). A block holds either the labels of
    one variable, weighted by their probabilities, or a single pass of variance v and fourth moment
    m, whose Cov_t is (m − v²) g⊗g⊗g⊗g. No large terms cancel: at Bernoulli's p = ½ m − v² is 0.

    Args:
        gram: Γ [..., n, n].
        square_weights: w of each pass [..., n].
        quartic_weights: w₄ of each pass [..., n].
        blocks: The label that each pass belongs to [n].

    Returns:
        The norm of each leading index [...].

    >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # g = ±1 with odds ½: g² never varies
    >>> half = torch.tensor([0.5, 0.5])
    >>> score_covariance_norm(gram, half, half, torch.zeros(2)).item()
    0.0
    """
    membership = _membership(blocks, gram)
    single_passes = membership.shape[0] == membership.shape[1]
    if single_passes:
        weights = (quartic_weights - square_weights.square()).clamp(min=0)
        within = gram.square()
    else:
        weights = square_weights
        within = _centred(gram, square_weights, membership)
    total = (weights.unsqueeze(-1) * weights.unsqueeze(-2) * within.square()).sum((-2, -1))
    if membership.shape[1] == 1:
        return total.sqrt()
    same_block = membership @ membership.T
    roots = square_weights.sqrt()
    x = gram * roots.unsqueeze(-1) * roots.unsqueeze(-2)  # F in the coordinates of the passes
    # of Σ_{s≠t}: Σ_{s≠t, u≠v} ⟨F_s, F_u⟩⟨F_t, F_v⟩ + tr(F_s F_u F_t F_v)
    off_diagonal = 1 - torch.eye(membership.shape[1], dtype=gram.dtype, device=gram.device)
    products = membership.T @ x.square() @ membership
    paths = x.unsqueeze(-2) * x.unsqueeze(-3)
    cycles = (paths @ (1 - same_block) * paths).sum(-1)
    total = total + 2 * (products * (off_diagonal @ products @ off_diagonal)).sum((-2, -1))
    total = total + 2 * (cycles * (1 - same_block)).sum((-2, -1))
    # between the two: Σ_{u≠v} E (gᵀF_u g)(gᵀF_v g) minus tr(F_t F_u F_t F_v)
    quadratic_forms = (gram.square() * square_weights.unsqueeze(-2)) @ membership
    crossed = (weights * (quadratic_forms @ off_diagonal * quadratic_forms).sum(-1)).sum(-1)
    if not single_passes:
        crossed = crossed - (cycles * same_block).sum((-2, -1))
    return (total + 4 * crossed).clamp(min=0).sqrt()


def score_covariance_spectral_norm(
    gram: Tensor, square_weights: Tensor, quartic_weights: Tensor, blocks: Tensor
) -> Tensor | None:
    """Return ‖Cov Î₁‖_op, which is λ_max(D^½ G̃ D^½) for one label.

    Args:
        gram: Γ [..., n, n].
        square_weights: w of each pass [..., n].
        quartic_weights: w₄ of each pass [..., n].
        blocks: The label that each pass belongs to [n].

    Returns:
        The norm of each leading index [...]; None for several labels with more than
        ``MAX_DENSE_PASSES`` passes.
    """
    membership = _membership(blocks, gram)
    n, num_labels = membership.shape
    if num_labels == 1 < n:
        roots = square_weights.sqrt()
        centred = _centred(gram, square_weights, membership)
        return largest_eigenvalue(centred * roots.unsqueeze(-1) * roots.unsqueeze(-2))
    if n > MAX_DENSE_PASSES:
        return None
    values, vectors = torch.linalg.eigh(gram)
    g = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # g_s in an orthonormal basis
    outer = g.unsqueeze(-1) * g.unsqueeze(-2)
    fishers = torch.einsum("...s,st,...sij->...tij", square_weights, membership, outer)
    if n == num_labels:
        weights = (quartic_weights - square_weights.square()).clamp(min=0)
    else:
        weights = square_weights
        outer = outer - torch.einsum("st,...tij->...sij", membership, fishers)
    covariance = torch.einsum("...s,...sij,...skl->...ijkl", weights, outer, outer)
    if num_labels > 1:
        others = fishers.sum(-3, keepdim=True) - fishers
    else:
        others = torch.zeros_like(fishers)
    for form in ("...tik,...tjl->...ijkl", "...til,...tjk->...ijkl"):
        covariance = covariance + torch.einsum(form, fishers, others)
    return largest_eigenvalue(covariance.reshape(*gram.shape[:-2], n * n, n * n))


def hessian_covariance_square(grams: Tensor, square_weights: Tensor) -> Tensor:
    """Return ‖Cov Î₂‖_F² = Σ w_y w_z S_yz².

    Args:
        grams: S of J independent directions [J, ..., n, n]; J = 1 where S is exact.
        square_weights: w of each label [..., n].

    Returns:
        The square of each leading index [...]. It is unbiased for J ≥ 2, because only products of
        different directions enter, and may then be negative.
    """
    weights = square_weights.unsqueeze(-1) * square_weights.unsqueeze(-2)
    directions = grams.shape[0]
    square = grams.sum(0).square() - (grams.square().sum(0) if directions > 1 else 0)
    pairs = directions * (directions - 1) if directions > 1 else 1
    return (weights * square).sum((-2, -1)) / pairs


def centre_classes(gram: Tensor, classes: int | None) -> Tensor:
    """Return (I − 11ᵀ/C) Γ (I − 11ᵀ/C) for the C outputs of each position.

    The softmax does not depend on the mean of its logits.

    Args:
        gram: Γ [..., n, n], n = positions · C.
        classes: C; None leaves ``gram`` as it is.
    """
    if classes is None:
        return gram
    n = gram.shape[-1]
    shape = (*gram.shape[:-2], n // classes, classes, n // classes, classes)
    x = gram.reshape(shape)
    x = x - x.mean(-1, keepdim=True)
    return (x - x.mean(-3, keepdim=True)).reshape(gram.shape)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Return λ_max of positive semidefinite matrices: s_max(J)² for JJᵀ."""
    return eigenvalues(gram)[..., -1].clamp(min=0)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices [..., n, n] in ascending order.

    They are NaN for a matrix that LAPACK cannot decompose: not finite, or zero.
    """
    # divided by its largest entry, else the squares inside LAPACK leave float64's range
    size = matrix.abs().amax((-2, -1), keepdim=True)
    known = torch.isfinite(size) & (size > 0)
    scaled = torch.where(known, matrix / size.where(known, 1), 0)
    try:
        values = torch.linalg.eigvalsh(scaled)
    except torch.linalg.LinAlgError:
        values = torch.full_like(scaled[..., 0], torch.nan)
    return (values * size.squeeze(-1)).masked_fill(~torch.isfinite(size.squeeze(-1)), torch.nan)


def square_of_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unbiased square of E v from K ≥ 2 probes v [..., K], and its standard error squared.

    >>> square_of_mean(torch.tensor([2.0, 3.0]))[0].item()
    6.0
    """
    probes = values.shape[-1]
    square = (values.sum(-1).square() - values.square().sum(-1)) / (probes * (probes - 1))
    # to first order: Var = 4 (E v)² Var v / K
    return square, 4 * values.mean(-1).square() * values.var(-1) / probes


def _centred(gram: Tensor, weights: Tensor, membership: Tensor) -> Tensor:
    """Return ⟨g_y g_yᵀ − F_t, g_z g_zᵀ − F_u⟩ [..., n, n], y a label of variable t and z of u."""
    squares = gram.square()
    mean = ((squares * weights.unsqueeze(-2)) @ membership) @ membership.T  # over z's variable
    double_mean = membership @ (membership.T @ (mean * weights.unsqueeze(-1)))
    return squares - mean - mean.transpose(-1, -2) + double_mean


def _membership(blocks: Tensor, like: Tensor) -> Tensor:
    """Return 1 where a pass belongs to a variable, else 0 [n, T]."""
    return torch.nn.functional.one_hot(blocks.long()).to(like.dtype)
