"""What computes second derivatives for ``second_order="auto"``, chosen once for each plan.

BackPACK's exact diagonals are taken where they cost no more than spot checks, and spot checks for
transformers. Elsewhere random probes measure first, and where their noise exceeds the error that spot
checks aim at, these take over.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.engines.autograd.full_precision import HALF_TYPES
from fimprobe.engines.autograd.tolerances import types_of_gradients
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.spot_checks.allocation import (
    LARGE_SHARE,
    LAYER_ERROR,
    SLOTS_PER_INPUT,
    TOTAL_ERROR,
)
from fimprobe.engines.tracing.graph import nodes_behind
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError
from fimprobe.estimators.i2 import label_variance, probe_error
from fimprobe.likelihoods import HeteroscedasticGaussian
from fimprobe.measurement.arguments import import_backpack
from fimprobe.statistics import CurvatureBatch, Measured

EXACT, PROBES, SPOT_CHECKS = "exact", "probes", "spot_checks"
"""The engines, as ``Plan.second_order`` names them."""

FORWARDS_PER_CHECK = 2.5
"""Forward passes of a spot check: two, and some are repeated with another step."""

_ATTENTION = {"SoftmaxBackward", "ScaledDotProduct", "EfficientAttention"}
"""Beginnings of names of operations in the graphs of transformers; BackPACK has none of them."""

_LOOKUP = "EmbeddingBackward"
"""The beginning of the name of a lookup of tokens."""

MIN_DEGREES_OF_FREEDOM = 8
"""Differences of probes, over all inputs, from which their noise is judged."""

FREE_MULTIPLY_ADDS = 1e8
"""Multiply-adds in the time that the calls of spot checks take, whatever the model: some 10 ms."""


def choose_engine(problem: Problem, plan: Plan) -> Request:
    """Return the request with what computes its second derivatives.

    Args:
        problem: The measurement.
        plan: A verified plan, which keeps the choice.

    Raises:
        FimprobeError: If spot checks are asked for, and rounding hides their differences.
    """
    if not problem.request.auto:
        if problem.request.spot_checks and rounding_hides_differences(problem):
            raise FimprobeError(
                "`second_order` must not be 'spot_checks' for a predicted variance in float32, got "
                "'spot_checks': their differences are lost in the rounding of the outputs. Use "
                "model.double(), or 'auto'."
            )
        return problem.request
    if not plan.second_order:
        operations = _operations(problem)
        if not operations & _ATTENTION and _is_exact_cheap(problem):
            plan.second_order, plan.backpack = EXACT, (plan.backpack or {}) | {True: {}}
        elif rounding_hides_differences(problem):
            plan.second_order = PROBES
        # spot checks have no single entries
        elif operations and not problem.diagonals:
            plan.second_order = SPOT_CHECKS
    if plan.second_order == SPOT_CHECKS and rounding_hides_differences(problem):
        plan.second_order = PROBES  # chosen for another family of labels
    engine = plan.second_order
    spot_checks = engine == SPOT_CHECKS and not problem.diagonals
    return replace(problem.request, exact=engine == EXACT, spot_checks=spot_checks)


def rounding_hides_differences(problem: Problem) -> bool:
    """Whether differences of forward passes are lost in the rounding of the outputs.

    Changes of the mean are differences between the two natural parameters of a Gaussian, which are
    larger by the mean over the standard deviation. Derivatives keep their digits.
    """
    types = {p.dtype for p in problem.parameters.values()}
    return isinstance(problem.likelihood, HeteroscedasticGaussian) and types != {torch.float64}


def _operations(problem: Problem) -> set[str]:
    """The operations in the graph by which transformers look up tokens or weight positions.

    The noise of probes then exceeds V2 in most layers. Trying them first would double the cost. Types
    whose rounding hides differences have none.
    """
    outputs = problem.forward(problem.batch[:1])
    if types_of_gradients(problem, outputs) & HALF_TYPES:
        return set()
    names = [node.name() for node in nodes_behind([outputs.grad_fn])]
    return {mixing for mixing in (_LOOKUP, *_ATTENTION) if any(n.startswith(mixing) for n in names)}


def _is_exact_cheap(problem: Problem) -> bool:
    """Whether BackPACK is right for the model, and costs no more than spot checks."""
    with_parameters = [m for m in problem.twin.modules() if any(True for _ in m.parameters(False))]
    if not all(type(m).__module__.startswith("torch.nn.") for m in with_parameters):
        return False  # without importing BackPACK
    if {p.dtype for p in problem.parameters.values()} != {torch.get_default_dtype()}:
        return False  # BackPACK would need another default, which all threads share
    try:
        backpack = import_backpack()
    except FimprobeError:
        return False
    work = backpack.estimate_work(problem)
    if work is None or work.exact == 0:  # the graph proves that no layer bends
        return False
    size = problem.batch.size
    of_checks = SLOTS_PER_INPUT * FORWARDS_PER_CHECK * work.forward * size
    if work.exact * size > of_checks + FREE_MULTIPLY_ADDS:
        return False
    return not backpack.offending_modules(problem, second_order=True)


def must_agree(plan: Plan, request: Request, processes: ProcessGroup) -> bool:
    """Return whether processes chose differently: all of them then measure again, by probes.

    Args:
        plan: Keeps the choice.
        request: What was requested.
        processes: Those that measure together.
    """
    if not request.auto or processes.size == 1:
        return False
    differ = len(set(processes.run_everywhere(lambda: plan.second_order))) > 1
    plan.second_order = PROBES if differ else plan.second_order
    return differ


def must_measure_again(measured: Measured, plan: Plan, request: Request, *, diagonals: bool) -> bool:
    """Return whether spot checks are to measure the batch in place of random probes.

    Processes decide the same, as the statistics are those of the whole batch.

    Args:
        measured: The statistics of the whole batch.
        plan: Keeps the decision.
        request: What was requested.
        diagonals: Whether entries were requested, which spot checks do not have.
    """
    if not request.auto or diagonals or plan.second_order or measured.curvature is None:
        return False
    plan.second_order = SPOT_CHECKS if are_probes_noisy(measured) else PROBES
    return plan.second_order == SPOT_CHECKS


def spot_checks_failed(measured: Measured, plan: Plan, request: Request) -> bool:
    """Return whether probes are to measure what spot checks could not.

    Args:
        measured: The statistics of the whole batch.
        plan: With the reason where probes cannot, either.
        request: What was requested.
    """
    checks = measured.spot_checks
    return bool(request.auto and checks is not None and checks.failure and not plan.curvature_failure)


def without_double_backward(problem: Problem, request: Request, plan: Plan) -> Request:
    """Return what is measured of a model whose graph cannot be differentiated twice.

    Args:
        problem: The measurement.
        request: What was requested.
        plan: Keeps the choice of spot checks, where it is one.
    """
    if rounding_hides_differences(problem):
        return replace(request, i2=False, exact=False)
    if request.auto:
        plan.second_order = SPOT_CHECKS
    if request.spot_checks or request.auto:
        return replace(request, exact=False, spot_checks=True, blocks=False)
    return replace(request, i2=False, exact=False)


def note_of_failure(plan: Plan, request: Request) -> str:
    """Return what was not measured of such a model, and why.

    Args:
        plan: With the reason.
        request: What was measured.
    """
    if not request.spot_checks:
        return plan.curvature_failure
    reason = plan.curvature_failure.replace("Î₂ was not", "Bounds and blocks of Î₂ were not", 1)
    return reason.replace(" second_order='spot_checks' needs none.", "")


def are_probes_noisy(measured: Measured) -> bool:
    """Return whether random probes leave V2 with more noise than spot checks aim at.

    Args:
        measured: The statistics of the whole batch.
    """
    curvature = measured.curvature
    assert curvature is not None
    if measured.moments["i1"].batch_size * (curvature.probes - 1) < MIN_DEGREES_OF_FREEDOM:
        return True  # the noise itself is not known
    layers: dict[str, list[str]] = {}
    for name in curvature.parameters:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    total, error = _label_variance(curvature, list(curvature.parameters))
    if error > TOTAL_ERROR * max(total, 0.0):
        return True
    found = [_label_variance(curvature, names) for names in layers.values()]
    return any(v2 > LARGE_SHARE * total and noise > LAYER_ERROR * v2 for v2, noise in found)


def _label_variance(curvature: CurvatureBatch, names: list[str]) -> tuple[float, float]:
    """V2 of some parameters, and the standard error that probes add to it."""

    def summed(field: str) -> Tensor | None:
        """Return the sum of a field over the parameters, for the labels; None if there is none."""
        values = [getattr(curvature.parameters[name], field) for name in names]
        if any(value is None for value in values):
            return None
        return torch.stack(values).sum(0)[:, : curvature.draws]

    square, probe_squares = summed("square"), summed("probe_squares")
    assert square is not None
    v2 = float(label_variance(square, curvature.weights))
    return v2, 0.0 if probe_squares is None else float(probe_error(probe_squares, curvature.weights))


def describe_engine(measured: Measured, request: Request, plan: Plan) -> None:
    """Add to the coverage of each parameter what Î₂ comes from; changes ``measured``.

    Args:
        measured: The statistics.
        request: What was requested.
        plan: How parameters were reached.
    """
    checks, curvature = measured.spot_checks, measured.curvature
    if checks is not None:
        if checks.failure:
            return
        bent = {name for stratum in checks.strata for name in stratum.parameters}
        words = "spot checks"
    elif curvature is not None:
        bent = {name for name, record in curvature.parameters.items() if bool(record.square.any())}
        how = "random probes by curvature propagation" if plan.propagates else "random probes"
        words = "exact, by BackPACK" if request.exact else f"{curvature.probes} {how}"
    else:
        return
    scores = measured.moments["i1"]
    scores.coverage = {
        name: f"{how}; Î₂: {words if name in bent else 'no second derivative'}"
        if name in scores.parameters
        else how
        for name, how in scores.coverage.items()
    }
