"""Second derivatives of the engine against those of single samples, on two samples of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.autograd.full_precision import HALF_TYPES, full_precision
from fimprobe.engines.autograd.gradient_differences import difference_norms, has_custom_functions
from fimprobe.engines.autograd.single_samples import single_sample_curvature
from fimprobe.engines.autograd.tolerances import allowed_differences, types_of_gradients
from fimprobe.engines.autograd.verification import measure_with_fallbacks, verification_problem
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.plan import Plan
from fimprobe.statistics import Measured

DIFFERENCE_TOLERANCE = 0.2
"""Relative difference of squared norms from those of differences of gradients. What a custom function
leaves out is far larger."""


def check_curvature(problem: Problem, plan: Plan) -> None:
    """Compare R u of single samples with plain double backward, along one direction u.

    If they differ, ``plan.curvature_failure`` gives the reason, and Î₂ is not reported.

    Args:
        problem: The measurement.
        plan: A verified plan; changed in place.
    """
    request = Request(i2=True, probes=problem.request.probes, backpack=problem.request.backpack)
    small = verification_problem(problem, request)
    if not types_of_gradients(small, small.forward(small.batch[:1])) & HALF_TYPES:
        _compare_curvature(small, plan)
        return
    with full_precision(small) as full:
        if full is not None:
            _compare_curvature(full, plan)
    if full is None:
        _compare_curvature(small, plan)


def _compare_curvature(small: Problem, plan: Plan) -> None:
    """Compare second derivatives of a few samples; see :func:`check_curvature`.

    Args:
        small: The samples.
        plan: A verified plan; changed in place.
    """
    plan.propagates = None
    measured = measure_with_fallbacks(small, plan)
    plan.chunk_size, plan.curvature_verified_samples = None, small.batch.size
    if measured.curvature is None:
        plan.curvature_failure = measured.notes[0]
        return
    disagreeing = _disagreeing_curvature(small, measured)
    if disagreeing:
        plan.curvature_failure = (
            "Î₂ was not measured: guard: second derivatives of "
            f"{', '.join(disagreeing[:5])} do not agree with those of single samples. A custom "
            "autograd function may lack a second derivative: second_order='spot_checks' needs none. "
            "Without such a function please report this, with the model."
        )


def _disagreeing_curvature(small: Problem, measured: Measured) -> list[str]:
    """Names of parameters whose second derivatives differ from those of single samples.

    Plain double backward is the reference where it knows every second derivative. It raises at an
    ``EmbeddingBag``, and may leave out that of a custom function without an error.
    """
    if small.shards is not None or not has_custom_functions(small):
        try:
            expected = single_sample_curvature(small)
            types = types_of_gradients(small, small.forward(small.batch[:1]))
            return _differing(measured, expected, types)
        except (RuntimeError, NotImplementedError):
            if small.shards is not None:
                return []
    return _differing(measured, difference_norms(small), None)


def _differing(
    measured: Measured, expected: dict[str, Tensor], types: set[torch.dtype] | None
) -> list[str]:
    """Names of parameters whose ‖(R_b u)_θ‖² [B] differ from what is expected.

    Args:
        measured: Holds the engine's second derivatives along the same direction.
        expected: ‖(R_b u)_θ‖² [B] by name; NaN where it is not known.
        types: Floating-point types on the way; None for norms of differences of gradients.
    """
    assert measured.curvature is not None
    largest = max((float(norms.nan_to_num(0).max()) for norms in expected.values()), default=0.0)
    disagreeing = []
    for name, norms in expected.items():
        curvature = measured.curvature.parameters.get(name)
        computed = torch.zeros_like(norms) if curvature is None else curvature.whole[0, :, 0]
        allowed = DIFFERENCE_TOLERANCE * norms + DIFFERENCE_TOLERANCE**2 * largest
        if types is not None:
            allowed = 5 * allowed_differences(norms, largest, types)
        if bool(((computed - norms).abs() > allowed).any()):
            disagreeing.append(name)
    return disagreeing
