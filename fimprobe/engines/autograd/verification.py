"""Decides and verifies how each parameter is reached, on the first samples of the batch.

The guard: samples evaluated alone through the plain twin, without hooks and rules, must give the same
outputs and the same squared gradients as the engine gives for them in a batch. Where a parameter
disagrees, it falls back to a larger module, up to the whole model. No number is reported before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.autograd.engine import measure_moments
from fimprobe.engines.autograd.fallback_choice import fall_back_to_parent
from fimprobe.engines.autograd.full_precision import HALF_TYPES, full_precision
from fimprobe.engines.autograd.gradient_differences import difference_norms, has_custom_functions
from fimprobe.engines.autograd.single_samples import (
    SingleGradient,
    single_sample_curvature,
    single_sample_gradients,
)
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.graph import gradient_types
from fimprobe.engines.tracing.layout_trace import trace_layouts
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.errors import CoupledSamplesError, FimprobeError
from fimprobe.likelihoods import Gaussian
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.fsdp.placement import is_part
from fimprobe.statistics import Measured, MomentsBatch

FLOAT64_OUTPUT_COPIES = 4.5
"""Copies of the outputs in float64 that are alive during verification, measured."""

VERIFICATION_SEED = 20240525
"""Random seed of the labels of verification."""

MAX_MISMATCHES, MAX_VERIFICATIONS = 100, 200
"""Limits on the number of times a plan is changed. A parameter can fall back at most as often as its
module is nested, so that only an error of this library reaches them."""

DIFFERENCE_TOLERANCE = 0.2
"""Relative difference of squared norms from those of differences of gradients. What a custom function
leaves out is far larger."""

NO_PLAN = (
    "the model must be measurable by layer rules or by the evaluation of single samples, but no plan "
    "agreed with single samples. Please report this, with the model."
)


def measure_with_fallbacks(problem: Problem, plan: Plan) -> Measured:
    """Measure; where the batch shows a use that the plan does not cover, extend the plan.

    Args:
        problem: The measurement.
        plan: How each parameter is reached; changed in place.

    Raises:
        FimprobeError: If a use cannot be covered.
    """
    for _ in range(MAX_MISMATCHES):
        try:
            return measure_moments(problem, plan)
        except PlanMismatch as mismatch:
            if problem.shards is not None:
                reasons = "; ".join(f"{name!r}: {why}" for name, why in mismatch.reasons.items())
                raise FimprobeError(
                    "a sharded model (FSDP) is measured by the rules of its layers, which must cover "
                    f"all trainable parameters, but they do not ({reasons}). Freeze the parameters "
                    "without a rule, or do not shard the model."
                ) from None
            fall_back_to_parent(problem, plan, mismatch.reasons)
    raise FimprobeError(NO_PLAN)


def make_verified_plan(problem: Problem, plan: Plan | None = None) -> Plan:
    """Find a plan with which the engine reproduces single samples.

    Args:
        problem: The measurement, whose first samples are compared.
        plan: A plan to begin with, which is changed where it disagrees; by default a new one.

    Raises:
        FimprobeError: If the model couples its samples, or no plan reproduces them.
    """
    problem = _verification_problem(problem, Request())
    if not _uses_half_precision(problem):
        return _verify(problem, plan)
    try:
        with full_precision(problem) as full:
            if full is not None:
                plan = _verify(full, plan)
    except RuntimeError:  # out of memory, or an operation for half precision only
        pass
    # kernels of half precision are others than those of float32
    return _verify(problem, plan)


def _verify(problem: Problem, plan: Plan | None = None) -> Plan:
    """Compare a plan with single samples, and change it until they agree.

    Args:
        problem: A few samples.
        plan: The first plan; by default a new one.

    Raises:
        FimprobeError: If the model couples its samples, or no plan reproduces them.
    """
    tolerance = dtype_tolerance(problem)
    if plan is None:
        plan = Plan(layouts=trace_layouts(problem, tolerance / 2))
    plan.layouts.settled = False
    gradients, outputs = single_sample_gradients(problem)
    _check_samples_independent(problem, outputs, tolerance)
    for _ in range(MAX_VERIFICATIONS):
        moments = measure_with_fallbacks(problem, plan).moments["i1"]
        disagreeing = _disagreeing(problem, moments, gradients, tolerance)
        if problem.shards is not None and not problem.shards.smallest(int(not disagreeing)):
            raise FimprobeError(
                "guard: per-sample gradients of the sharded model must agree with those of single "
                f"samples, but {', '.join(map(repr, disagreeing)) or 'those of another process'} "
                "differ. Please report this, with the model."
            )
        if not disagreeing:
            # the chunk size fits this problem of few samples without second derivatives
            plan.layouts.settled, plan.chunk_size = True, None
            plan.verified_samples = problem.batch.size
            return plan
        without_alternative = [name for name in disagreeing if plan.fallbacks.get(name) == ""]
        if without_alternative and "" not in plan.unvectorized:
            # under vmap the model has other parameters than its own; views of those, and backward
            # passes that run the model again, do not see them
            plan.unvectorized.add("")
        elif without_alternative:
            raise FimprobeError(
                "guard: per-sample gradients must agree with those of single samples, but "
                f"{', '.join(map(repr, without_alternative))} differ. Please report this, with the "
                "model."
            )
        nested = [name for name in disagreeing if name not in without_alternative]
        fall_back_to_parent(problem, plan, dict.fromkeys(nested, "guard"))
    raise FimprobeError(NO_PLAN)


def check_curvature(problem: Problem, plan: Plan) -> None:
    """Compare R u of single samples with plain double backward, along one direction u.

    If they differ, ``plan.curvature_failure`` gives the reason, and Î₂ is not reported.

    Args:
        problem: The measurement.
        plan: A verified plan; changed in place.
    """
    request = Request(i2=True, probes=problem.request.probes, backpack=problem.request.backpack)
    small = _verification_problem(problem, request)
    if not _uses_half_precision(small):
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
            return _differing(measured, expected, 5 * dtype_tolerance(small))
        except (RuntimeError, NotImplementedError):
            if small.shards is not None:
                return []
    return _differing(measured, difference_norms(small), DIFFERENCE_TOLERANCE)


def _differing(measured: Measured, expected: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names of parameters whose ‖(R_b u)_θ‖² [B] differ from what is expected.

    Args:
        measured: Holds the engine's second derivatives along the same direction.
        expected: ‖(R_b u)_θ‖² [B] by name; NaN where it is not known.
        tolerance: Relative difference that is allowed.
    """
    assert measured.curvature is not None
    largest = max((float(norms.nan_to_num(0).max()) for norms in expected.values()), default=0.0)
    disagreeing = []
    for name, norms in expected.items():
        curvature = measured.curvature.parameters.get(name)
        computed = torch.zeros_like(norms) if curvature is None else curvature.whole[0, :, 0]
        slack = tolerance * norms + tolerance**2 * largest
        if bool(((computed - norms).abs() > slack).any()):
            disagreeing.append(name)
    return disagreeing


def _verification_problem(problem: Problem, request: Request) -> Problem:
    """The problem with few samples and a Gaussian likelihood, without mask.

    Its scores are independent standard normal numbers. Every output and every parameter then has a
    cotangent that is not zero, which a softmax that is sure of its label would not give.
    """
    shards = problem.shards
    if shards is not None and not request.i2:
        shards = shards.alone()
    return replace(
        problem,
        batch=problem.batch[: _verification_size(problem)],
        likelihood=Gaussian(),
        draws=Draws(count=1, seed=VERIFICATION_SEED),
        mask=None,
        diagonals=False,
        request=request,
        shards=shards,
    )


def _verification_size(problem: Problem) -> int:
    """Number of samples to compare: three, or two if three of many outputs exceed the memory limit.

    One sample alone could not show that the engine mixes samples.
    """
    output_bytes = problem.evaluate(problem.batch[:1]).numel() * 8
    needed = 3 * FLOAT64_OUTPUT_COPIES * output_bytes
    size = min(problem.batch.size, 3 if needed <= problem.memory_mb * 2**20 else 2)
    return size if problem.shards is None else problem.shards.smallest(size)


def _check_samples_independent(problem: Problem, outputs: Tensor, tolerance: float) -> None:
    """Raise if the outputs of a batch differ from those [B, ...] of its samples alone."""
    in_batch = problem.evaluate(problem.batch)
    if torch.allclose(in_batch, outputs, **_output_tolerance(outputs, tolerance)):
        return
    difference = float((in_batch - outputs).abs().max())
    raise CoupledSamplesError(
        "the model must not couple its samples, but one sample alone gives other outputs than in the "
        f"batch (they differ by up to {difference:.2g}), so that its Fisher information is no mean "
        "over samples. Replace layers that use statistics of the batch in eval mode (BatchNorm with "
        "track_running_stats=False) or draw random numbers in eval mode. Make inputs that all "
        "samples read, such as a memory bank, buffers of the model."
    )


def _disagreeing(
    problem: Problem,
    moments: MomentsBatch,
    gradients: dict[str, list[SingleGradient]],
    tolerance: float,
) -> list[str]:
    """Names of parameters whose Σ_b g² per entry, or ‖g_b‖², differ from those of single samples.

    Norms show a sample that was mixed with another, entries a wrong order inside the parameter.
    Gradients that are zero except for rounding are compared with the largest of all parameters.
    """
    expected = {}
    for name, of_samples in gradients.items():
        norms = torch.tensor([0.0 if g is None else g[1] for g in of_samples], dtype=torch.float64)
        squares = sum(g[0].double().square() for g in of_samples if g is not None)
        expected[name] = (squares, norms)
    largest = max((float(norms.max()) for _, norms in expected.values()), default=0.0)
    slack = tolerance**2 * largest
    disagreeing = []
    for name, (squares, norms) in expected.items():
        computed = moments.parameters.get(name)
        if computed is None:
            if float(norms.sum()) > slack:
                disagreeing.append(name)
            continue
        norm_errors = (computed.squared_norms[:, 0].cpu() - norms).abs()
        a2: Any = computed.a2
        local_a2 = (a2.to_local() if is_part(a2) else a2).double()
        entry_error = float((local_a2 - squares).abs().sum())
        wrong_norms = bool((norm_errors > tolerance * norms + slack).any())
        if wrong_norms or entry_error > tolerance * float(norms.sum()) + slack * len(norms):
            disagreeing.append(name)
    return disagreeing


def dtype_tolerance(problem: Problem) -> float:
    """Relative difference allowed between gradients, by the coarsest type in the computation.

    Norms and softmaxes of language models compute in float32, whatever the type of the parameters.
    """
    return tolerance_of_types(_gradient_types(problem))


def tolerance_of_types(types: set[torch.dtype]) -> float:
    """The same, from the floating-point types of parameters and gradients."""
    if types & HALF_TYPES:
        return 0.2  # the plan was compared in float32 before, except where the model cannot run so
    return 2e-3 if torch.float32 in types else 1e-7


def _gradient_types(problem: Problem) -> set[torch.dtype]:
    """Floating-point types of the parameters, and of the gradients on the way to them."""
    types = {p.dtype for p in problem.parameters.values()}
    return types | gradient_types(problem.forward(problem.batch[:1]))


def _uses_half_precision(problem: Problem) -> bool:
    return bool(_gradient_types(problem) & HALF_TYPES)


def _output_tolerance(outputs: Tensor, tolerance: float) -> dict[str, Any]:
    """Arguments of :func:`torch.allclose` for outputs: half of the tolerance for gradients."""
    relative = tolerance / 2
    return {"rtol": relative, "atol": relative * float(outputs.detach().abs().amax())}
