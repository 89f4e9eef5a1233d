"""Certified upper bounds of the largest singular value of a matrix or an operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 1 + 1e-11
"""A factor above the rounding errors of float64 in norms of the sizes that layers have."""

MAX_DENSE_PRODUCTS = 2**21
"""Eigenvalues of k Gram matrices [n, n] are computed up to so many multiplications k n³."""

MAX_CHEAP_PRODUCTS = 2**18
"""Below so many multiplications s_max is computed even if nothing requires it."""

LANCZOS_FAILURE_PROBABILITY = 1e-10
"""The probability that a bound by Lanczos steps is too small."""

MAX_LANCZOS_ELEMENTS = 2**26
"""Elements of all Lanczos vectors: 256 MB in float32."""


def to_float64(x: Tensor) -> Tensor:
    """``x`` in float64; moved to the CPU if the device (MPS) has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def to_accurate_dtype(x: Tensor) -> Tensor:
    """``x`` in a dtype whose products keep its precision.

    That is float32 on a CPU, unless settings of torch allow reduced precision; else float64, whose
    products no device shortens.
    """
    onednn = torch.backends.mkldnn
    backends = (torch.backends, onednn, *(getattr(onednn, n, None) for n in ("conv", "matmul")))
    precisions = {getattr(backend, "fp32_precision", "none") for backend in backends}
    if x.dtype == torch.float64 or x.device.type != "cpu" or precisions - {"none", "ieee"}:
        return to_float64(x)
    return x.float()


def is_cheap(count: int, high: int, width: int) -> bool:
    """Whether s_max of some blocks costs almost nothing.

    Args:
        count: Number of blocks.
        high: Rows of a block.
        width: Columns of a block.
    """
    return count * min(high, width) ** 3 <= MAX_CHEAP_PRODUCTS


def blocks_norm(blocks: Tensor, *, excess: float) -> float:
    """A bound of s_max of a block diagonal matrix.

    It comes from eigenvalues if these are cheap, else from :func:`lanczos_norm`.

    Args:
        blocks: The blocks [k, m, n], real or complex.
        excess: The bound is at most ``1 + excess`` times s_max.

    >>> round(blocks_norm(torch.tensor([[[3.0]], [[4.0]]]).double(), excess=0.1), 9)
    4.0
    """
    count, high, width = blocks.shape
    if count * min(high, width) ** 3 <= MAX_DENSE_PRODUCTS:
        return math.sqrt(float(gram_bound(blocks).max()))
    if high < width:
        blocks, width = blocks.mT, high
    conjugate = blocks.conj().resolve_conj()

    def gram(v: Tensor) -> Tensor:  # rows: thin matrices of columns are slow
        rows = v.view(-1, count, width).transpose(0, 1)
        return ((rows @ blocks.mT) @ conjugate).transpose(0, 1).reshape(v.shape)

    return lanczos_norm(gram, blocks.new_empty(count * width), excess=excess)


def gram_bound(matrix: Tensor, squarings: int | None = None) -> Tensor:
    """A bound of s_max² of each matrix, in float64 [...]: λ_max of the smaller Gram matrix.

    A sum of n products has a relative error n u, u being the unit roundoff. The matrix of all errors
    has a norm of at most n u times the trace, which is added.

    Args:
        matrix: Matrices [..., m, n].
        squarings: If given, λ_max is bounded by :func:`power_norm`, else computed.
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
    """A bound of λ_max of positive semidefinite matrices, in float64: ‖Gᵖ‖_F^(1/p).

    It is at most n^(1/2p) times λ_max, and close to it if a few eigenvalues dominate. Each squaring
    has an error of at most n u ‖·‖_F², which is n^1.5 u relative to its result.

    Args:
        gram: Matrices G [..., n, n].
        squarings: p = 2^squarings.

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
    """A bound of s_max(A) by Lanczos steps, too small with a probability of at most δ = 1e-10.

    k Lanczos steps from a start v uniform on the sphere of R^n or C^n give a Ritz value θ ≤ λ =
    s_max². The bound is √(θ/(1−ε)). If θ < μ = (1−ε)λ, let p(x) = T_{2k−1}(s)/s with the Chebyshev
    polynomial T and s² = 1 − x/μ. Then p(AᴴA)v has a Rayleigh quotient below μ, which implies
    |v₁| sinh((2k−1) artanh√ε) < 1 for v₁ = v·(top eigenvector). P(|v₁| < a) is at most a √(2n/π) in
    R^n and n a² in C^n. The bound is too small only if all of m = 8 (complex 4) independent starts
    fail, each with probability δ^(1/m). The a of that probability gives √ε as
    tanh(arsinh(1/a)/(2k−1)), whatever the spectrum.

    In the dtype of ``like``, products with a relative error η shift λ by η and v₁ by η/ε, which is
    subtracted from a. In float32 this is less than half of a for n up to 10⁶.

    Args:
        gram: The map V ↦ V AᴴA for rows V [m, n].
        like: A tensor of n elements with the dtype and the device to compute in.
        excess: The bound is at most ``1 + excess`` times s_max. This does not hold where the vectors
            would take more than 2²⁶ elements: the number of steps is then reduced.

    Source: Kuczyński & Woźniakowski (1992), theorem 4.2, with the constant derived here.
    """
    size, is_complex = like.numel(), like.is_complex()
    starts, eps = (4 if is_complex else 8), torch.finfo(like.dtype).eps
    chance = LANCZOS_FAILURE_PROBABILITY ** (1 / starts)
    overlap = math.sqrt(chance / size) if is_complex else chance * math.sqrt(math.pi / 2 / size)
    overlap -= min(overlap / 2, 32 * eps / (1 - (1 + excess) ** -2))
    level = math.asinh(1 / overlap)
    needed_steps = math.ceil((level / math.acosh(1 + excess) + 1) / 2)
    steps = max(1, min(needed_steps, size, MAX_LANCZOS_ELEMENTS // (starts * size)))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(starts, 1, size, generator=generator, dtype=like.dtype).to(like.device)
    # complex vectors as pairs of real numbers: p(AᴴA)v and q(AᴴA)v have real inner products
    v = torch.view_as_real(v).flatten(2) if is_complex else v
    basis = v.new_zeros(starts, steps, v.shape[2])
    basis[:, :1] = v / (v @ v.mT).sqrt()
    diagonal, off_diagonal = v.new_zeros(2, steps, starts)
    for k in range(steps):
        x = basis[:, k]
        if is_complex:
            x = torch.view_as_complex(x.view(starts, size, 2))
        w = gram(x).unsqueeze(1)
        w = torch.view_as_real(w).flatten(2) if is_complex else w
        known = basis[:, : k + 1]
        components = w @ known.mT
        diagonal[k] = components[:, 0, k]
        if k + 1 == steps:
            break
        w = torch.baddbmm(w, components, known, alpha=-1)
        w = torch.baddbmm(w, w @ known.mT, known, alpha=-1)  # orthogonal only after the second pass
        beta = (w @ w.mT)[:, 0, 0].sqrt()
        # an invariant subspace: more steps would change nothing, and vectors of zeros do not
        beta = torch.where(beta > 16 * eps * diagonal[: k + 1].amax(0), beta, 0)
        off_diagonal[k] = beta
        basis[:, k + 1] = w.squeeze(1) / torch.where(beta > 0, beta, torch.inf).unsqueeze(1)
    diagonal, off_diagonal = diagonal.double().cpu().T, off_diagonal.double().cpu().T
    ritz = torch.diag_embed(diagonal) + torch.diag_embed(off_diagonal[:, :-1], -1)
    theta = max(0.0, float(torch.linalg.eigvalsh(ritz).max()))
    reached = needed_steps if steps == size else steps
    margin = ROUNDING * (1 + 16 * math.sqrt(size) * eps)
    return math.sqrt(theta) * math.cosh(level / (2 * reached - 1)) * margin  # 1/√(1−tanh²) = cosh
