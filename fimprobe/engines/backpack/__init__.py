"""The BackPACK engine: a second way to the same moments, and exact second-order diagonals.

It uses BackPACK's hooks and rules inside a verified domain (:func:`offending_modules`). Outside of
the domain BackPACK is silently wrong. The engine is the oracle of the autograd engine: both use the
same label cotangents, and share no other computation. Only this package imports BackPACK. Import it
inside of functions: it takes time, and changes what later imports find of torchvision.

Source: Dangel, Kunstner & Hennig (2020), *BackPACK: Packing more into backprop* (ICLR).
"""

from __future__ import annotations

from torch import Tensor

from fimprobe.engines.backpack.domain import check_domain, offending_modules
from fimprobe.engines.backpack.first_order import moments_in_domain
from fimprobe.engines.backpack.second_order import ggn_in_domain, hessian_in_domain
from fimprobe.engines.backpack.work import estimate_work
from fimprobe.engines.problem.problem import Problem
from fimprobe.model.batch import Batch
from fimprobe.statistics import MomentsBatch
from fimprobe.torchvision_compat import hide_broken_torchvision

__all__ = [
    "estimate_work",
    "ggn_diagonals",
    "hessian_diagonals",
    "hessian_sums",
    "measure_moments",
    "offending_modules",
]

hide_broken_torchvision()  # BackPACK installs it, and transformers may be imported after this


def measure_moments(problem: Problem, *, verified: bool = False) -> MomentsBatch:
    """Moments of every trainable parameter (A2, A4, Q, R and Gram matrices of the scores).

    Σ g of every parameter is compared with its gradient by plain autograd.

    Args:
        problem: Model, batch, likelihood and draws.
        verified: Whether :func:`offending_modules` found nothing for this model; it is then skipped.

    Raises:
        FimprobeError: Outside of the domain, or if the comparison fails.
    """
    if not verified:
        check_domain(problem, second_order=False)
    return moments_in_domain(problem)


def hessian_diagonals(
    problem: Problem, batch: Batch, cotangents: Tensor, *, verified: bool = False
) -> dict[str, Tensor]:
    """Exact per-sample diagonals of R = Σ_a v_a ∂²h_a/∂θ∂θᵀ, for several v.

    With label scores as cotangents v, this is the R of Î₂ = F − R: Soen & Sun (2021), eq. 11. It is
    zero for parameters on which the outputs depend linearly.

    Args:
        problem: The model.
        batch: Inputs of B samples.
        cotangents: n vectors v [n, B, ...], each of the shape of the outputs, held fixed. They share
            most of the work.
        verified: As in :func:`measure_moments`.

    Returns:
        Diagonals [n, B, *shape] of every trainable parameter.

    Raises:
        FimprobeError: Outside of the domain, or for cotangents of another shape.
    """
    if not verified:
        check_domain(problem, second_order=True)
    diagonals = hessian_in_domain(problem, batch, cotangents)
    return {name: diagonal.entries() for name, diagonal in diagonals.items()}


def hessian_sums(
    problem: Problem, batch: Batch, cotangents: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of the diagonals of :func:`hessian_diagonals` and of their squares, in less memory.

    Args:
        problem: The model, for which :func:`offending_modules` found nothing.
        batch: Inputs of B samples.
        cotangents: n vectors v [n, B, ...].

    Returns:
        Σ_i R_ii and Σ_i R_ii² [n, B] of every trainable parameter, in float64.

    Raises:
        FimprobeError: For cotangents of another shape.
    """
    diagonals = hessian_in_domain(problem, batch, cotangents)
    return {name: diagonal.sums() for name, diagonal in diagonals.items()}


def ggn_diagonals(
    problem: Problem, batch: Batch, *, mask: Tensor | None = None, verified: bool = False
) -> dict[str, Tensor]:
    """Exact per-sample diagonals of F(x) = Jᵀ I(h) J.

    Args:
        problem: The model and the likelihood.
        batch: Inputs of B samples.
        mask: Positions that count, bool [B, ...] of the shape of the labels; None for all of them.
        verified: As in :func:`measure_moments`.

    Returns:
        Diagonals [B, *shape] of every trainable parameter.

    Raises:
        FimprobeError: Outside of the domain, or for a likelihood without ``output_fisher``.
    """
    if not verified:
        check_domain(problem, second_order=True, curvature=False)
    return ggn_in_domain(problem, batch, mask)
