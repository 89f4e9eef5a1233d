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
from fimprobe.engines.autograd.single_samples import (
    SingleGradient,
    single_sample_curvature,
    single_sample_gradients,
)
from fimprobe.engines.layers.decompositions import UNROLLED
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.graph import gradient_types
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.recording import record_forward
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Gaussian
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.fsdp import is_part
from fimprobe.statistics import Measured, MomentsBatch

FLOAT64_OUTPUT_COPIES = 4.5
"""Copies of the outputs in float64 that are alive during verification, measured."""

VERIFICATION_SEED = 20240525
"""Random seed of the labels of verification."""

MAX_MISMATCHES, MAX_VERIFICATIONS = 100, 200
"""Limits on the number of times a plan is changed. A parameter can fall back at most as often as its
module is nested, so that only an error of this library reaches them."""

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
            _fall_back_to_parent(problem, plan, mismatch.reasons)
    raise FimprobeError(NO_PLAN)


def make_verified_plan(problem: Problem) -> Plan:
    """Find a plan with which the engine reproduces single samples.

    Raises:
        FimprobeError: If the model couples its samples, or no plan reproduces them.
    """
    problem = _verification_problem(problem, Request())
    tolerance = _tolerance_of_dtype(problem)
    plan = Plan(layouts=_decide_expansions(problem, tolerance))
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
        _fall_back_to_parent(problem, plan, dict.fromkeys(nested, "guard"))
    raise FimprobeError(NO_PLAN)


def check_curvature(problem: Problem, plan: Plan) -> None:
    """Compare R u of single samples with plain double backward, along one direction u.

    If they differ, ``plan.curvature_failure`` gives the reason, and Î₂ is not reported.

    Args:
        problem: The measurement.
        plan: A verified plan; changed in place.
    """
    request = replace(problem.request, i2=True, ih=False, labels=None, bounds=False, exact=False)
    small = _verification_problem(problem, request)
    measured = measure_with_fallbacks(small, plan)
    plan.chunk_size, plan.curvature_verified_samples = None, small.batch.size
    if measured.curvature is None:
        plan.curvature_failure = measured.notes[0]
        return
    try:
        expected = single_sample_curvature(small)
    except (RuntimeError, NotImplementedError):
        return  # plain autograd has no second derivative of every parameter (EmbeddingBag): no check
    largest = max((float(norms.max()) for norms in expected.values()), default=0.0)
    tolerance = 5 * _tolerance_of_dtype(problem)
    disagreeing = []
    for name, norms in expected.items():
        curvature = measured.curvature.parameters.get(name)
        computed = torch.zeros_like(norms) if curvature is None else curvature.whole[0, :, 0]
        slack = tolerance * norms + tolerance**2 * largest
        if bool(((computed - norms).abs() > slack).any()):
            disagreeing.append(name)
    if disagreeing:
        plan.curvature_failure = (
            "Î₂ was not measured: guard: second derivatives of "
            f"{', '.join(disagreeing[:5])} do not agree with those of single samples. Please report "
            "this, with the model."
        )


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
    with torch.no_grad():
        output_bytes = problem.forward(problem.batch[:1]).numel() * 8
    needed = 3 * FLOAT64_OUTPUT_COPIES * output_bytes
    size = min(problem.batch.size, 3 if needed <= problem.memory_mb * 2**20 else 2)
    return size if problem.shards is None else problem.shards.smallest(size)


def _check_samples_independent(problem: Problem, outputs: Tensor, tolerance: float) -> None:
    """Raise if the outputs of a batch differ from those [B, ...] of its samples alone."""
    with torch.no_grad():
        in_batch = problem.forward(problem.batch).detach()
    if torch.allclose(in_batch, outputs, **_output_tolerance(outputs, tolerance)):
        return
    difference = float((in_batch - outputs).abs().max())
    raise FimprobeError(
        "the model must not couple its samples, but one sample alone gives other outputs than in the "
        f"batch (they differ by up to {difference:.2g}), so that its Fisher information is no mean "
        "over samples. Replace layers that use statistics of the batch in eval mode (BatchNorm with "
        "track_running_stats=False) or draw random numbers in eval mode."
    )


def _decide_expansions(problem: Problem, tolerance: float) -> BatchLayouts:
    """Layouts with the lookups whose index can be expanded to the batch.

    If the expansions change the outputs, or the model cannot run with them, all are refused.
    """
    layouts = BatchLayouts()
    with torch.no_grad():
        plain = problem.forward(problem.batch)
    try:
        with record_forward(problem.twin, problem.batch.size, layouts, {}):
            expanded = problem.forward(problem.batch)
        if torch.allclose(plain, expanded.detach(), **_output_tolerance(plain, tolerance)):
            # without expansions nothing is kept of this trial
            return layouts if layouts.expand else BatchLayouts()
    except (RuntimeError, FimprobeError, ValueError, IndexError):
        if not layouts.expand:
            raise
    without_expansion = BatchLayouts()
    without_expansion.refused = set(layouts.expand)
    return without_expansion


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


def _tolerance_of_dtype(problem: Problem) -> float:
    """Relative difference allowed between gradients, by the coarsest type in the computation.

    Norms and softmaxes of language models compute in float32, whatever the type of the parameters.
    """
    types = {p.dtype for p in problem.parameters.values()}
    types |= gradient_types(problem.forward(problem.batch[:1]))
    if types & {torch.bfloat16, torch.float16}:
        return 0.2
    return 2e-3 if torch.float32 in types else 1e-7


def _output_tolerance(outputs: Tensor, tolerance: float) -> dict[str, Any]:
    """Arguments of :func:`torch.allclose` for outputs: half of the tolerance for gradients."""
    relative = tolerance / 2
    return {"rtol": relative, "atol": relative * float(outputs.detach().abs().amax())}


def _fall_back_to_parent(problem: Problem, plan: Plan, reasons: dict[str, str]) -> None:
    """Move parameters to the next larger module around them.

    Args:
        problem: The model.
        plan: Changed in place.
        reasons: Why, by the name of a parameter, or by the path of a module for the parameters that
            are measured there.
    """
    names: set[str] = set()
    for key, reason in reasons.items():
        if key in problem.parameters:
            names.add(key)
            continue
        ids = {id(p) for p in problem.twin.get_submodule(key).parameters()}
        inside = {n for n, p in problem.parameters.items() if id(p) in ids}
        at_module = {n for n in inside if plan.fallbacks.get(n, key) == key}
        if not at_module:
            raise FimprobeError(
                f"module {key!r} must be recorded, but it cannot be ({reason}). Please report this, "
                "with the model."
            )
        for name in at_module:  # what cannot be recorded cannot be re-evaluated either
            plan.fallbacks.setdefault(name, key)
        names |= at_module
    for name in names:
        plan.fallbacks[name] = _parent_module(problem, plan, name)


def _parent_module(problem: Problem, plan: Plan, name: str) -> str:
    """Path of the next module at which to measure a parameter.

    First the smallest module that contains all its owners (a tied weight has several), then the
    parent of the last one.
    """
    planned = plan.fallbacks.get(name)
    if planned == "":
        raise FimprobeError(
            f"parameter {name!r} must be reached from the whole model at least, but it is not. "
            "Please report this, with the model."
        )
    if planned is not None:
        return planned.rpartition(".")[0]
    parameter = problem.parameters[name]
    owners = [
        path
        for path, module in problem.twin.named_modules()
        if any(p is parameter for p in module._parameters.values())
    ]
    common = _common_prefix([owner.split(".") if owner else [] for owner in owners])
    module = problem.twin.get_submodule(".".join(common))
    # the only owner was a fallback already if it has no rule for the parameter
    was_fallback = len(owners) == 1 and name.rpartition(".")[2] not in rules_for(module)
    if was_fallback and type(module) not in UNROLLED:
        return ".".join(common[:-1])
    return ".".join(common)


def _common_prefix(paths: list[list[str]]) -> list[str]:
    """The longest list with which all lists start."""
    common = paths[0]
    for path in paths[1:]:
        length = 0
        while length < min(len(common), len(path)) and common[length] == path[length]:
            length += 1
        common = common[:length]
    return common
