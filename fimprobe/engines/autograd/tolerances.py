"""Differences between two computations of a gradient that rounding explains."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.autograd.full_precision import HALF_TYPES
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.graph import gradient_types


def tolerance_of_types(types: set[torch.dtype]) -> float:
    """Return the relative difference allowed between gradients.

    The coarsest type in the computation decides. Norms and softmaxes of language models compute in
    float32, whatever the type of the parameters.

    Args:
        types: Floating-point types of parameters and gradients.
    """
    if types & HALF_TYPES:
        return 0.2  # the plan was compared in float32 before, except where the model cannot run so
    return 2e-3 if torch.float32 in types else 1e-7


def allowed_differences(squares: Tensor, largest: Tensor | float, types: set[torch.dtype]) -> Tensor:
    """Return the differences of squared norms of gradients that rounding explains.

    With a gradient g of relative error ε, and an error r of rounding that does not depend on ‖g‖ (as
    where large terms cancel), ‖g‖² differs by ε‖g‖² + 2‖g‖r + r². r is relative to the gradient of
    the parameter that has the largest.

    Args:
        squares: ‖g‖² as expected.
        largest: The largest of all parameters.
        types: Floating-point types on the way of the gradients.

    Returns:
        Of the shape of ``squares``.
    """
    rounding = rounding_of_types(types)
    cancelled = 2 * rounding * (squares * largest).sqrt() + rounding**2 * largest
    return tolerance_of_types(types) * squares + cancelled


def rounding_of_types(types: set[torch.dtype]) -> float:
    """Return the rounding of a gradient whose terms cancel, relative to the largest gradient."""
    if types & HALF_TYPES:
        return 0.2
    # far above rounding in float64: iterations in a forward, as for an inverse, end a little apart
    return 2e-5 if torch.float32 in types else 1e-9


def types_of_gradients(problem: Problem, outputs: Tensor) -> set[torch.dtype]:
    """Return the floating-point types of the parameters, and of the gradients on the way to them.

    Args:
        problem: The measurement.
        outputs: Some outputs with their graph.
    """
    return {p.dtype for p in problem.parameters.values()} | gradient_types(outputs)
