"""Decides and verifies how each parameter is reached, on two samples of the batch.

The guard: samples evaluated alone through the plain twin, without hooks and rules, must give the same
outputs and the same squared gradients as the engine gives for them in a batch. Where a parameter
disagrees, it falls back to a larger module, up to the whole model. No number is reported before.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.autograd.engine import measure_moments
from fimprobe.engines.autograd.fallback_choice import fall_back_to_parent
from fimprobe.engines.autograd.full_precision import HALF_TYPES, full_precision
from fimprobe.engines.autograd.single_samples import (
    SingleGradient,
    single_sample_gradients,
)
from fimprobe.engines.autograd.tolerances import (
    allowed_differences,
    tolerance_of_types,
    types_of_gradients,
)
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.layout_trace import trace_layouts
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.errors import CoupledSamplesError, FimprobeError
from fimprobe.likelihoods import Gaussian
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.fsdp.placement import is_part
from fimprobe.statistics import Measured, MomentsBatch

VERIFICATION_SEED = 20240525
"""Random seed of the labels of verification."""

MAX_MISMATCHES, MAX_VERIFICATIONS = 100, 200
"""Limits on the number of times a plan is changed. A parameter can fall back at most as often as its
module is nested, so that only an error of this library reaches them."""

_SQUARES_IN_FLOAT32 = (1e-20, 1e30)
"""Largest squared norms of gradients whose squared entries float32 can hold."""

NO_PLAN = (
    "the model must be measurable by layer rules or by the evaluation of single samples, but no plan "
    "agreed with single samples. Please report this, with the model."
)


@dataclass(frozen=True)
class RandomCotangents(Gaussian):
    """Scores that are independent uniform numbers with variance one, for any outputs.

    Every output and every parameter then has a cotangent that is not zero, which a softmax that is
    sure of its label would not give. Normal numbers would take longer to compute.
    """

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return h + √12 (u − ½).

        Args:
            outputs: h [B, ...].
            uniforms: In (0, 1), float64 [B, ...].

        Returns:
            Labels [B, ...], float64.
        """
        return outputs.double() + math.sqrt(12) * (uniforms - 0.5)

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return 9/5."""
        return torch.full_like(outputs, 1.8)


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
    problem, outputs = _run_few_samples(problem)
    if types_of_gradients(problem, outputs) & HALF_TYPES:
        try:
            with full_precision(problem) as full:
                if full is not None:
                    plan = _verify(full, plan, full.forward(full.batch))
        except RuntimeError:  # out of memory, or an operation for half precision only
            pass
    # kernels of half precision are others than those of float32
    return _verify(problem, plan, outputs)


def _verify(problem: Problem, plan: Plan | None, outputs: Tensor) -> Plan:
    """Compare a plan with single samples, and change it until they agree.

    Args:
        problem: A few samples.
        plan: The first plan; None for a new one.
        outputs: Those of the samples [B, ...], with their graph.

    Raises:
        FimprobeError: If the model couples its samples, or no plan reproduces them.
    """
    types = types_of_gradients(problem, outputs)
    tolerance = tolerance_of_types(types)
    in_batch = outputs.detach()
    del outputs  # its graph
    if plan is None:
        plan = Plan(layouts=trace_layouts(problem, in_batch, tolerance / 2))
    plan.layouts.settled = False
    gradients, of_samples = single_sample_gradients(problem)
    _check_samples_independent(in_batch, of_samples, tolerance)
    for _ in range(MAX_VERIFICATIONS):
        moments = measure_with_fallbacks(problem, plan).moments["i1"]
        disagreeing = _disagreeing(moments, gradients, types)
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


def _run_few_samples(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem to verify a plan with, and its outputs [B, ...] with their graph.

    Raises:
        FimprobeError: If the model fails on a few samples, and the gradients of all of them exceed
            ``memory_mb``.
        Exception: What the model raises on the whole batch.
    """
    small = verification_problem(problem, Request())
    try:
        return small, small.forward(small.batch)
    except FimprobeError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        size, of_each = problem.batch.size, sum(p.nbytes for p in problem.parameters.values())
        if small.batch.size == size:
            raise
        if size * of_each > problem.memory_mb * 2**20:
            raise FimprobeError(
                f"the model raises {type(error).__name__}: {error} on {small.batch.size} of {size} "
                "samples. It can be verified on all of them only if their gradients fit into "
                f"memory_mb, {problem.memory_mb:,g} MB, but these take {size * of_each / 2**20:,.3g} "
                "MB. Pass a larger memory_mb, or let the forward take any number of samples."
            ) from error
    # the model runs with one size only, which verifies on more samples than needed
    whole = verification_problem(problem, Request(), rows=slice(None))
    return whole, whole.forward(whole.batch)


def verification_problem(
    problem: Problem, request: Request, rows: slice | Tensor | None = None
) -> Problem:
    """Return the problem with few samples and random cotangents, without mask.

    Args:
        problem: The measurement.
        request: The statistics that are computed.
        rows: The samples. By default the first one, and one drawn at random: neighbours may be
            alike, as in a sorted batch.
    """
    size, shards = problem.batch.size, problem.shards
    if shards is not None:
        size = shards.smallest(size)
        shards = shards if request.i2 else shards.alone()
    if rows is None:
        others = random.Random(problem.draws.seed).sample(range(1, size), min(size - 1, 1))
        rows = torch.tensor([0, *others])
    return replace(
        problem,
        batch=problem.batch[rows],
        likelihood=RandomCotangents(),
        draws=Draws(count=1, seed=VERIFICATION_SEED),
        mask=None,
        diagonals=False,
        request=request,
        shards=shards,
    )


def _check_samples_independent(in_batch: Tensor, outputs: Tensor, tolerance: float) -> None:
    """Raise if the outputs [B, ...] of a batch differ from those of its samples alone."""
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
    moments: MomentsBatch, gradients: dict[str, list[SingleGradient]], types: set[torch.dtype]
) -> list[str]:
    """Names of parameters whose Σ_b g² per entry, or ‖g_b‖², differ from those of single samples.

    Norms show a sample that was mixed with another, entries a wrong order inside the parameter.

    Args:
        moments: The engine's; A2 is overwritten.
        gradients: Those of single samples.
        types: Floating-point types on the way of the gradients.
    """
    if not gradients:
        return []
    norms = torch.tensor(
        [[0.0 if g is None else g[1] for g in of_samples] for of_samples in gradients.values()],
        dtype=torch.float64,
    )
    largest = float(norms.max())
    # squares of gradients in float32 neither overflow there, nor vanish beside rounding
    in_float32 = _SQUARES_IN_FLOAT32[0] < largest < _SQUARES_IN_FLOAT32[1]
    allowed = allowed_differences(norms, largest, types)
    zeros = norms.new_zeros(norms.shape[1])
    computed = [moments.parameters.get(name) for name in gradients]
    squared_norms = [zeros if m is None else m.squared_norms[:, 0].cpu().double() for m in computed]
    norms_differ = ((torch.stack(squared_norms) - norms).abs() > allowed).any(1).tolist()
    disagreeing = []
    for i, (name, of_samples) in enumerate(gradients.items()):
        known = computed[i]
        entry_error = 0.0
        if known is not None and not norms_differ[i]:
            a2: Any = known.a2
            squares = a2.to_local() if is_part(a2) else a2
            if not (in_float32 and squares.dtype == torch.float32):
                squares = squares.double()
            entry_error = _distance_of_squares(squares, [g[0] for g in of_samples if g is not None])
        if norms_differ[i] or not entry_error <= float(allowed[i].sum()):
            disagreeing.append(name)
    return disagreeing


def _distance_of_squares(squares: Tensor, gradients: list[Tensor]) -> float:
    """Σ |A2 − Σ_b g_b²| over all entries, in the type of ``squares``, which holds A2.

    It is overwritten: a copy of a large weight's A2 would cost more than the differences.
    """
    for g in gradients:
        g = (g.to_dense() if g.is_sparse else g).to(squares)
        squares.addcmul_(g, g, value=-1)
    return float(torch.linalg.vector_norm(squares, 1))


def _output_tolerance(outputs: Tensor, tolerance: float) -> dict[str, Any]:
    """Arguments of :func:`torch.allclose` for outputs: half of the tolerance for gradients."""
    relative = tolerance / 2
    return {"rtol": relative, "atol": relative * float(outputs.detach().abs().amax())}
