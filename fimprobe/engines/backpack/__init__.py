"""The BackPACK engine: a second way to the same moments, and exact second-order diagonals.

Works on BackPACK's hooks and rules, inside a verified domain (:func:`offending_modules`): outside
of it BackPACK is silently wrong. Shares the labels' seeds, but no contraction, with the autograd
engine, whose oracle it is. Only this package imports BackPACK; import it where it is needed.

Source: Dangel, Kunstner, Hennig 2020, *BackPACK: Packing more into backprop* (ICLR).
"""

from __future__ import annotations

from torch import Tensor

from fimprobe.engines.backpack.domain import check_domain, offending_modules
from fimprobe.engines.backpack.first_order import moments_in_domain
from fimprobe.engines.backpack.second_order import ggn_in_domain, hessian_in_domain
from fimprobe.engines.problem.problem import Problem
from fimprobe.model.batch import Batch
from fimprobe.statistics import MomentsBatch

__all__ = ["ggn_diagonals", "hessian_diagonals", "measure_moments", "offending_modules"]


def measure_moments(problem: Problem, *, verified: bool = False) -> MomentsBatch:
    """Moments of every trainable parameter (A2, A4, Q, R and Gram matrices of the scores).

    ``verified=True`` skips :func:`offending_modules`, for problems that it has passed. Σ g of every
    parameter is compared with its gradient by plain autograd.

    Raises:
        FimprobeError: outside of the domain, or where the comparison fails.
    """
    if not verified:
        check_domain(problem, second_order=False)
    return moments_in_domain(problem)


def hessian_diagonals(
    problem: Problem, batch: Batch, seed: Tensor, *, verified: bool = False
) -> dict[str, Tensor]:
    """Per-sample diagonals [B, *shape] of R = Σ_a seed_a ∂²h_a/∂θ∂θᵀ, exact.

    ``seed`` [B, ...] has the shape of the outputs and is held fixed; with the score residual for a
    seed this is the R of Î₂ = F − R (P1, eq. 11). Zero for modules that enter linearly.

    Raises:
        FimprobeError: outside of the domain, or a seed of another shape.
    """
    if not verified:
        check_domain(problem, second_order=True)
    return hessian_in_domain(problem, batch, seed)


def ggn_diagonals(
    problem: Problem, batch: Batch, *, mask: Tensor | None = None, verified: bool = False
) -> dict[str, Tensor]:
    """Per-sample diagonals [B, *shape] of F(x) = Jᵀ I(h) J, exact, for any likelihood.

    ``mask`` [B, ...] (bool, shaped like the labels) leaves positions out.

    Raises:
        FimprobeError: outside of the domain, or a likelihood without ``output_fisher``.
    """
    if not verified:
        check_domain(problem, second_order=True, curvature=False)
    return ggn_in_domain(problem, batch, mask)
