"""The BackPACK engine: a second way to the same moments, and exact second-order diagonals.

It uses BackPACK's hooks and rules inside a verified domain (:func:`offending_modules`). Outside of
the domain BackPACK is silently wrong. The engine is the oracle of the autograd engine: both use the
same label cotangents, and share no other computation. Only this package imports BackPACK, which is
optional: import the package inside of functions.

Source: Dangel, Kunstner & Hennig (2020), *BackPACK: Packing more into backprop* (ICLR).
"""

from __future__ import annotations

from torch import Tensor

from fimprobe.engines.backpack.domain import check_domain, offending_modules
from fimprobe.engines.backpack.first_order import moments_in_domain
from fimprobe.engines.backpack.second_order import ggn_in_domain, hessian_in_domain
from fimprobe.engines.problem.problem import Problem
from fimprobe.model.batch import Batch
from fimprobe.statistics import MomentsBatch
from fimprobe.torchvision_compat import hide_broken_torchvision

__all__ = ["ggn_diagonals", "hessian_diagonals", "measure_moments", "offending_modules"]

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
    """Exact per-sample diagonals of R = Σ_a v_a ∂²h_a/∂θ∂θᵀ.

    With label scores as cotangents v, this is the R of Î₂ = F − R: Soen & Sun (2021), eq. 11. It is
    zero for parameters on which the outputs depend linearly.

    Args:
        problem: The model.
        batch: Inputs of B samples.
        cotangents: v [B, ...], of the shape of the outputs, held fixed.
        verified: As in :func:`measure_moments`.

    Returns:
        Diagonals [B, *shape] of every trainable parameter.

    Raises:
        FimprobeError: Outside of the domain, or for cotangents of another shape.
    """
    if not verified:
        check_domain(problem, second_order=True)
    return hessian_in_domain(problem, batch, cotangents)


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
