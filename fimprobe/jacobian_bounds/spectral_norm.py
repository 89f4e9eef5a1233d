"""The largest singular value of a matrix or an operator, never too small."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 1 + 1e-11
"""What float64 arithmetic may take from a norm of the sizes met here, with room to spare."""
DENSE, CHEAP = 2**21, 2**18
"""Eigenvalues of k matrices [n, n] are taken up to this k n³, and always up to that."""
LANCZOS_FAILURE, LANCZOS_NUMBERS = 1e-10, 2**26


def wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def accurate(x: Tensor) -> Tensor:
    """In a dtype whose products have its precision: float32 on a CPU that is not told otherwise,
    else float64, which no device shortens.
    """
    onednn = torch.backends.mkldnn
    parts = (torch.backends, onednn, *(getattr(onednn, n, None) for n in ("conv", "matmul")))
    told = {getattr(part, "fp32_precision", "none") for part in parts}
    if x.dtype == torch.float64 or x.device.type != "cpu" or told - {"none", "ieee"}:
        return wide(x)
    return x.float()


def is_cheap(count: int, high: int, width: int) -> bool:
    """Whether s_max of ``count`` blocks [high, width] costs next to nothing."""
    return count * min(high, width) ** 3 <= CHEAP


def blocks_norm(blocks: Tensor, *, excess: float) -> float:
    """s_max of the block diagonal matrix of ``blocks`` [k, m, n], real or complex.

    From eigenvalues where they are cheap, else by :func:`lanczos_norm`, up to ``excess`` above.

    >>> round(blocks_norm(torch.tensor([[[3.0]], [[4.0]]]).double(), excess=0.1), 9)
    4.0
    """
    count, high, width = blocks.shape
    if count * min(high, width) ** 3 <= DENSE:
        return math.sqrt(float(gram_bound(blocks).max()))
    if high < width:
        blocks, width = blocks.mT, high
    conjugate = blocks.conj().resolve_conj()

    def gram(v: Tensor) -> Tensor:  # rows: thin matrices of columns are slow
        rows = v.view(-1, count, width).transpose(0, 1)
        return ((rows @ blocks.mT) @ conjugate).transpose(0, 1).reshape(v.shape)

    return lanczos_norm(gram, blocks.new_empty(count * width), excess=excess)


def gram_bound(matrix: Tensor, squarings: int | None = None) -> Tensor:
    """At least s_max² of each [..., m, n]: λ_max of the smaller Gram matrix, in float64 [...].

    With ``squarings`` by :func:`power_norm`. A sum of n products has a relative error n u, and the
    errors of all a norm of at most n u times the trace.
    """
    narrow = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    gram = narrow @ narrow.mH
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=torch.float64)
    if squarings is None:
        gram = gram.to(torch.complex128 if gram.is_complex() else torch.float64)
        largest = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0) * ROUNDING
    else:
        largest = power_norm(gram, squarings)
    return largest + trace * (narrow.shape[-1] * torch.finfo(matrix.dtype).eps)


def power_norm(gram: Tensor, squarings: int) -> Tensor:
    """At least λ_max of positive semidefinite G [..., n, n]: ‖Gᵖ‖_F^(1/p), p = 2^``squarings``.

    At most n^(1/2p) times it, and near it where a few eigenvalues dominate. Each squaring has an
    error of at most n u ‖·‖_F², which is n^1.5 u of what it yields. In float64.

    >>> round(float(power_norm(torch.diag(torch.tensor([1.0, 0.5])).double(), 2)), 6)
    1.000487
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    power = gram / torch.where(trace > 0, trace, 1)[..., None, None]
    for _ in range(squarings):
        power = power @ power
    norm = power.flatten(-2).square().sum(-1).double().sqrt()
    margin = 1 + 4 * gram.shape[-1] ** 1.5 * torch.finfo(gram.dtype).eps
    return norm**0.5**squarings * trace.double() * margin


def lanczos_norm(gram: Callable[[Tensor], Tensor], like: Tensor, *, excess: float) -> float:
    """A bound of s_max(A), at most ``1 + excess`` times it, from V ↦ V AᴴA for rows V [m, n].

    k Lanczos steps from a start v uniform on the sphere of R^n or C^n give a Ritz value θ ≤ λ =
    s_max²; the bound is √(θ/(1−ε)). If θ < μ = (1−ε)λ, then p(AᴴA)v, p(x) = T_{2k−1}(s)/s with the
    Chebyshev T and s² = 1 − x/μ, has a Rayleigh quotient below μ, which shows
    |v₁| sinh((2k−1) artanh√ε) < 1 for v₁ = v·(top eigenvector). P(|v₁| < a) is at most a √(2n/π) in
    R^n and n a² in C^n. All of m = 8 (complex 4) independent starts must fail, each with
    probability δ^(1/m), δ = 1e-10: √ε = tanh(arsinh(1/a)/(2k−1)) with the a that gives it, whatever
    the spectrum.

    In the dtype of ``like``: products with a relative error η shift λ by η and v₁ by η/ε, which is
    taken off a; in float32 it is less than half of it for n up to 10⁶. Where the vectors would take
    more than 2²⁶ numbers there are fewer steps, and ``excess`` is not kept.

    Source: Kuczyński & Woźniakowski 1992, theorem 4.2, with the constant worked out.
    """
    size, folded = like.numel(), like.is_complex()
    starts, eps = (4 if folded else 8), torch.finfo(like.dtype).eps
    chance = LANCZOS_FAILURE ** (1 / starts)
    overlap = math.sqrt(chance / size) if folded else chance * math.sqrt(math.pi / 2 / size)
    overlap -= min(overlap / 2, 32 * eps / (1 - (1 + excess) ** -2))
    level = math.asinh(1 / overlap)
    wanted = math.ceil((level / math.acosh(1 + excess) + 1) / 2)
    steps = max(1, min(wanted, size, LANCZOS_NUMBERS // (starts * size)))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(starts, 1, size, generator=generator, dtype=like.dtype).to(like.device)
    v = torch.view_as_real(v).flatten(2) if folded else v  # p(AᴴA)v and q(AᴴA)v have real products
    basis = v.new_zeros(starts, steps, v.shape[2])
    basis[:, :1] = v / (v @ v.mT).sqrt()
    diagonal, beside = v.new_zeros(2, steps, starts)
    for k in range(steps):
        x = basis[:, k]
        if folded:
            x = torch.view_as_complex(x.view(starts, size, 2))
        w = gram(x).unsqueeze(1)
        w = torch.view_as_real(w).flatten(2) if folded else w
        known = basis[:, : k + 1]
        parts = w @ known.mT
        diagonal[k] = parts[:, 0, k]
        if k + 1 == steps:
            break
        w = torch.baddbmm(w, parts, known, alpha=-1)
        w = torch.baddbmm(w, w @ known.mT, known, alpha=-1)  # orthogonal only after the second pass
        beta = (w @ w.mT)[:, 0, 0].sqrt()
        # an invariant subspace: more steps would change nothing, and vectors of zeros do not
        beta = torch.where(beta > 16 * eps * diagonal[: k + 1].amax(0), beta, 0)
        beside[k] = beta
        basis[:, k + 1] = w.squeeze(1) / torch.where(beta > 0, beta, torch.inf).unsqueeze(1)
    diagonal, beside = diagonal.double().cpu().T, beside.double().cpu().T
    ritz = torch.diag_embed(diagonal) + torch.diag_embed(beside[:, :-1], -1)
    theta = max(0.0, float(torch.linalg.eigvalsh(ritz).max()))
    reached = wanted if steps == size else steps
    margin = ROUNDING * (1 + 16 * math.sqrt(size) * eps)
    return math.sqrt(theta) * math.cosh(level / (2 * reached - 1)) * margin  # 1/√(1−tanh²) = cosh
