"""Norms, traces and largest eigenvalues of I(h) and M for softmax outputs.

I(h) = diag p − ppᵀ is the output Fisher information of one position, and M = K − I⊗I, where K is the
fourth central moment of the one-hot label. In the formulas s_k = Σ p^k, m = p_max and e = 1 − m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.likelihoods.base import OutputNorms
from fimprobe.likelihoods.output_norms import combine_positions, position_mask
from fimprobe.likelihoods.softmax import Softmax, complements, softmax

MAX_EIGENVALUE_WORK = 2**18
"""Positions × classes³ per input up to which eigenvalues are exact: 2 ms on one core (measured)."""

_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ON_CPU = 2**20, 2**16
"""Elements in each of about twenty arrays that exist at the same time: 8 MiB each in float64. On a
CPU they should stay in its cache: three times as fast for 1,000 to 50,000 classes (measured)."""

_FACTORIAL = (1, 1, 2, 6, 24)
_MULTINOMIAL = {
    (i, j, 4 - i - j): 24 // (_FACTORIAL[i] * _FACTORIAL[j] * _FACTORIAL[4 - i - j])
    for i in range(5)
    for j in range(5 - i)
}


def softmax_norms(h: Tensor, mask: Tensor | None) -> OutputNorms:
    """Return the norms of every input in float64, with O(C) memory per position.

    The largest eigenvalues are exact if T·C³ ≤ ``MAX_EIGENVALUE_WORK``. Otherwise they are bounds:
    λ_max(I) ≤ min{p_max, 1−s₂, 2 max p(1−p), ‖I‖_F} and λ_max(M) ≤ min{(1+s₂) λ_max(I), ‖M‖_F}.
    The latter follows from E(δᵀBδ)² ≤ max‖δ‖² tr(B I B) for ‖B‖_F = 1 and ‖δ_y‖² = 1 − 2p_y + s₂.
    λ_min(I) = 0, as I(h)1 = 0.

    Args:
        h: Logits [B, T, C].
        mask: Bool [B, T] or of the labels' shape; False leaves a position out.
    """
    positions, classes = h.shape[1:]
    exact = positions * classes**3 <= MAX_EIGENVALUE_WORK
    keep = position_mask(mask, h[..., 0])
    values = torch.zeros((6, *keep.shape), dtype=torch.float64, device=h.device)
    elements = _CHUNK_ELEMENTS_ON_CPU if h.device.type == "cpu" else _CHUNK_ELEMENTS
    chunk = max(1, elements // (classes**2 if exact else classes))
    for indices in keep.nonzero().split(chunk):
        b, t = indices.unbind(1)
        values[:, b, t] = _position_norms(softmax(h[b, t].double()), exact)
    norm, trace, largest, m_norm, m_trace, m_largest = values
    return combine_positions(
        OutputNorms(
            fisher_norm=norm,
            fisher_trace=trace,
            fisher_max=largest,
            fisher_min=torch.zeros_like(norm),
            moment_norm=m_norm,
            moment_trace=m_trace,
            moment_max=m_largest,
        ),
        mask,
    )


def fisher(s: Softmax) -> Tensor:
    """Return I = diag p − ppᵀ [..., C, C]."""
    matrix = -s.p.unsqueeze(-1) * s.p.unsqueeze(-2)
    matrix.diagonal(dim1=-2, dim2=-1).copy_(s.p * complements(s))
    return matrix


def fisher_square(s: Softmax) -> Tensor:
    """Return ‖I‖_F² = Σ p²(1−p)² + Σ_{j≠k} p_j² p_k² [...]."""
    diagonal = (s.p * complements(s)).square().sum(-1)
    t2 = s.rest.square().sum(-1)
    off_diagonal = 2 * s.p_max.square() * t2 + t2.square() - s.rest.square().square().sum(-1)
    return diagonal + off_diagonal


def moment_trace(s: Softmax) -> Tensor:
    """Return tr M = E‖δ‖⁴ − ‖I‖_F² [...]."""
    t2 = s.rest.square().sum(-1)
    square = (1 - s.p).square() + s.p_max.square().unsqueeze(-1)  # valid for the rest only
    square = square + t2.unsqueeze(-1) - s.p.square()
    top = s.p_max * (s.complement.square() + t2).square()
    fourth = top + (s.rest * square.square()).sum(-1)
    return fourth - fisher_square(s)


def moment_norm(s: Softmax) -> Tensor:
    """Return ‖M‖_F = √(‖K‖_F² − 2⟨K, I⊗I⟩ + ‖I‖_F⁴) [...], in O(C)."""
    cross = _fisher_weighted_square(s)
    return (_kurtosis_square(s) - 2 * cross + fisher_square(s).square()).clamp(min=0).sqrt()


def _kurtosis_square(s: Softmax) -> Tensor:
    """Return ‖K‖_F² = Σ_{y,z} p_y p_z (δ_y·δ_z)⁴ [...], where δ_y·δ_z = [y=z] − p_y − p_z + s₂."""
    e, m = s.complement, s.p_max
    squares, fourths = s.rest.square(), s.rest.square().square()
    powers = (s.rest, squares, squares * s.rest, fourths, fourths * s.rest, fourths * squares)
    t1, t2, t3, t4, t5, t6 = (x.sum(-1) for x in powers)
    a = m.square() + t2  # s₂
    b = t2 - m * e  # s₂ − p_max
    total = m.square() * (e.square() + t2).pow(4)
    total = total + 2 * m * (
        b.pow(4) * t1 - 4 * b.pow(3) * t2 + 6 * b.square() * t3 - 4 * b * t4 + t5
    )
    total = total + (squares * (1 - 2 * s.rest + a.unsqueeze(-1)).square().square()).sum(-1)
    t = [t1, t2, t3, t4, t5]
    pairs = torch.zeros_like(e)  # Σ_{y≠z in the rest} p_y p_z (a − p_y − p_z)⁴
    for i in range(5):
        for j in range(5 - i):
            k = 4 - i - j
            factor = (-1) ** (i + j) * _MULTINOMIAL[(i, j, k)]
            equal = [t2, t3, t4, t5, t6][i + j]
            pairs = pairs + factor * a.pow(k) * (t[i] * t[j] - equal)
    return total + pairs


def _fisher_weighted_square(s: Softmax) -> Tensor:
    """Return ⟨K, I⊗I⟩ = Σ_y p_y q_y² [...] with q_y = δ_yᵀ I δ_y."""
    e, m = s.complement, s.p_max
    squares = s.rest.square()
    t2, t3 = squares.sum(-1), (squares * s.rest).sum(-1)
    a = (m.square() + t2).unsqueeze(-1)  # s₂
    s3_minus = (1 - e).pow(3) * e - 2 * (1 - e).square() * t2 - t2.square() + t3  # s₃ − s₂²
    q = s.rest - 3 * squares + 2 * s.rest * a + s3_minus.unsqueeze(-1)
    mean = (m * e - t2).unsqueeze(-1)
    q_top = m * (e.square() + t2).square() + (s.rest * (s.rest + mean).square()).sum(-1)
    return m * q_top.square() + (s.rest * q.square()).sum(-1)


def _position_norms(s: Softmax, exact: bool) -> Tensor:
    """Return ‖I‖, tr I, λ_max(I), ‖M‖, tr M, λ_max(M) of positions [n, C], stacked [6, n]."""
    norm, diagonal = fisher_square(s).sqrt(), s.p * complements(s)
    trace, m_norm, m_trace = diagonal.sum(-1), moment_norm(s), moment_trace(s)
    if exact:
        largest = torch.linalg.eigvalsh(fisher(s))[..., -1]
        m_largest = torch.linalg.eigvalsh(_moment_gram(s))[..., -1].clamp(min=0)
    else:
        largest = torch.stack([s.p_max, trace, 2 * diagonal.amax(-1), norm]).amin(0)
        s2 = s.p.square().sum(-1)
        # if E‖δ‖⁴ is far above ‖M‖_F, the rounding error of ‖M‖_F must not move it below λ_max
        rounding = 1e-14 * (m_trace + norm.square()).square()
        m_largest = torch.minimum((1 + s2) * largest, (m_norm.square() + rounding).sqrt())
    return torch.stack([norm, trace, largest, m_norm, m_trace.clamp(min=0), m_largest])


def _moment_gram(s: Softmax) -> Tensor:
    """Return D^½ G̃ D^½ [n, C, C], which has the nonzero eigenvalues of M.

    See docs/theory.md, "Norms from Gram matrices", with J the identity.

    Γ_yz = δ_y·δ_z, G = Γ∘Γ, G̃_yz = ⟨δ_yδ_yᵀ − I, δ_zδ_zᵀ − I⟩ = G_yz − (Gp)_y − (Gp)_z + pᵀGp.
    """
    scores = (-s.p.unsqueeze(-2)).repeat(1, s.p.shape[-1], 1)
    scores.diagonal(dim1=-2, dim2=-1).copy_(complements(s))
    square = (scores @ scores.mT).square()
    mean = square @ s.p.unsqueeze(-1)
    centred = square - mean - mean.mT + s.p.unsqueeze(-2) @ mean
    root = s.p.sqrt()
    return root.unsqueeze(-1) * centred * root.unsqueeze(-2)
