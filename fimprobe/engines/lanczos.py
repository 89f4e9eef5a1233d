"""The norm of an operator from few products with it, too small at most once in 10¹⁰."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

STARTS, FAILURE, NUMBERS = 4, 1e-10, 2**26


def lanczos_norm(gram: Callable[[Tensor], Tensor], like: Tensor, *, excess: float) -> float:
    """A bound of s_max(A), at most ``1 + excess`` times it, from V ↦ AᵀA V of rows V [4, n].

    k Lanczos steps from a start v uniform on the sphere of R^n give a Ritz value θ ≤ λ = s_max²;
    the bound is √(θ/(1−ε)). If θ < (1−ε)λ, the polynomial that turns into the Chebyshev T_{2k−1} on
    the eigenvalues below (1−ε)λ shows |v₁| sinh((2k−1) artanh√ε) < 1 for v₁ = v·(top eigenvector),
    and P(|v₁| < a) ≤ a √(2n/π). All of m independent starts must fail, each with probability
    δ^(1/m), δ = 1e-10. So √ε = tanh(arsinh(√(2n/π) δ^(−1/m))/(2k−1)), whatever the spectrum.

    In the dtype of ``like``: products with a relative error η shift λ by η and v₁ by η/ε, which is
    to be small beside δ^(1/m)/√n; 4 starts leave that room in float32. Where the vectors would take
    more than 2²⁶ numbers there are fewer steps, and ``excess`` is not kept.

    Source: Kuczyński & Woźniakowski 1992, theorem 4.2, with the constant worked out.
    """
    size, eps = like.numel(), torch.finfo(like.dtype).eps
    level = math.asinh(math.sqrt(2 * size / math.pi) * FAILURE ** (-1 / STARTS))
    wanted = math.ceil((level / math.acosh(1 + excess) + 1) / 2)
    steps = max(1, min(wanted, size, NUMBERS // (STARTS * size)))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(STARTS, size, generator=generator, dtype=torch.float64).to(like)
    basis = v.new_zeros(STARTS, steps, size)
    basis[:, 0] = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    ritz = torch.zeros(STARTS, steps, steps, dtype=torch.float64)
    for k in range(steps):
        w = gram(basis[:, k])
        ritz[:, k, k] = (basis[:, k] * w).sum(1).double().cpu()
        if k + 1 == steps:
            break
        length = torch.linalg.vector_norm(w, dim=1)
        known = basis[:, : k + 1]
        for _ in range(2):  # orthogonal to working precision takes two passes
            w = torch.baddbmm(w.unsqueeze(1), (known @ w.unsqueeze(2)).mT, known, alpha=-1).squeeze(1)
        beta = torch.linalg.vector_norm(w, dim=1)
        # an invariant subspace: more steps would change nothing, and vectors of zeros do not
        beta = torch.where(beta > 4 * eps * length, beta, 0)
        ritz[:, k, k + 1] = ritz[:, k + 1, k] = beta.double().cpu()
        basis[:, k + 1] = w / torch.where(beta > 0, beta, torch.inf).unsqueeze(1)
    theta = max(0.0, float(torch.linalg.eigvalsh(ritz).max()))
    reached = wanted if steps == size else steps
    rounding = 1 + 64 * math.sqrt(size) * eps
    return math.sqrt(theta) * math.cosh(level / (2 * reached - 1)) * rounding  # 1/√(1−tanh²) = cosh
