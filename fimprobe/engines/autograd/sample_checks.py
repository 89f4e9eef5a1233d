"""Single samples of a measured batch against the numbers that the measurement gave them.

A plan is verified on two samples of the first batch. Other samples may take another way through
the forward, and later batches may have another structure. Samples at random therefore run alone, with
the cotangents of their labels: in every measurement where shapes or ways may depend on data, else in
the first ones, for each new shape of the inputs, after a change of the model, and now and then.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from fimprobe.engines.autograd.curvature_verification import check_curvature
from fimprobe.engines.autograd.single_samples import check_finite, squared_norm
from fimprobe.engines.autograd.tolerances import allowed_differences, types_of_gradients
from fimprobe.engines.autograd.verification import (
    VERIFICATION_SEED,
    RandomCotangents,
    make_verified_plan,
    measure_with_fallbacks,
)
from fimprobe.engines.moments.contraction import at_least_float32
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.problem.label_cotangents import label_cotangents
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.draws import Draws
from fimprobe.statistics import Measured

_MAX_ATTEMPTS = 3

_CHECKS_OF_A_CHANGED_PLAN = 6
"""Samples that are checked where a batch showed a use that the plan did not cover: nothing else has
verified the change."""


_FIRST_CHECKS_WHERE_SHAPES_DEPEND_ON_DATA = 4
"""Samples that the first measurement compares: sorting leaves some of them in their places."""

_FIRST_MEASUREMENTS, _MEASUREMENTS_PER_CHECK = 3, 8
"""Measurements of a plan that are all checked, and one in how many later ones."""

_MAX_STATES = 1000
"""Fingerprints of the model, with shapes of inputs, that are remembered."""


def samples_to_check(problem: Problem, plan: Plan) -> int:
    """Return how many samples this measurement compares, and count it.

    Args:
        problem: The measurement.
        plan: A verified plan, which counts measurements and remembers what was compared.
    """
    number, fingerprint = plan.measurements, plan.twin and plan.twin.fingerprint
    plan.measurements += 1
    state = str([fingerprint, *(tuple(x.shape) for x in problem.batch.tensors())])
    is_new = state not in plan.checked_states
    if is_new and len(plan.checked_states) < _MAX_STATES:
        plan.checked_states.add(state)
    depends_on_data = bool(plan.layouts.unsure) or not plan.layouts.traced
    if number == 0 and depends_on_data:
        return _FIRST_CHECKS_WHERE_SHAPES_DEPEND_ON_DATA
    is_due = number < _FIRST_MEASUREMENTS or number % _MEASUREMENTS_PER_CHECK == 0
    return int(is_new or depends_on_data or is_due)


def measure_and_check(problem: Problem, plan: Plan, count: int) -> Measured:
    """Measure; where a single sample disagrees, verify the plan with that sample and measure again.

    Args:
        problem: The measurement.
        plan: A verified plan; changed in place.
        count: Number of samples to check.

    Raises:
        FimprobeError: If no plan agrees with single samples.
    """
    for attempt in range(_MAX_ATTEMPTS):
        fallbacks = dict(plan.fallbacks)
        measured = measure_with_fallbacks(problem, plan)
        changed = plan.fallbacks != fallbacks
        wrong = find_wrong_sample(problem, measured, _CHECKS_OF_A_CHANGED_PLAN if changed else count)
        if wrong is None or _agrees_for_large_cotangents(problem, plan, wrong):
            return measured
        _verify_with(problem, plan, wrong, anew=attempt == 0)
    raise FimprobeError(
        "guard: per-sample gradients must agree with those of single samples, but those of sample "
        f"{wrong} of the batch differ under every plan. Please report this, with the model."
    )


def _agrees_for_large_cotangents(problem: Problem, plan: Plan, sample: int) -> bool:
    """Whether a sample agrees in the same batch with cotangents of size one.

    The score of a label that the model is sure of may be smaller than the rounding of the outputs.
    Then a difference says nothing about the plan; random cotangents do.
    """
    large = replace(
        problem,
        likelihood=RandomCotangents(),
        draws=Draws(count=1, seed=VERIFICATION_SEED),
        mask=None,
        diagonals=False,
        request=Request(),
    )
    chunk_size = plan.chunk_size
    try:
        return _agrees(large, measure_with_fallbacks(large, plan), sample)
    finally:
        plan.chunk_size = chunk_size  # that of the measurement itself


def _verify_with(problem: Problem, plan: Plan, sample: int, *, anew: bool) -> None:
    """Verify the plan on a sample and those after it.

    Args:
        problem: The measurement; Î₂ is taken off its request if that cannot be verified.
        plan: Changed in place.
        sample: The place of the sample.
        anew: Whether to begin with a new plan. Otherwise parameters that disagree fall back.
    """
    rows = torch.arange(sample, sample + problem.batch.size) % problem.batch.size
    first = replace(problem, batch=problem.batch[rows])
    verified = make_verified_plan(first, None if anew else plan)
    verified.keep_settings(plan)
    for f in fields(Plan):
        setattr(plan, f.name, getattr(verified, f.name))
    if problem.request.i2:
        check_curvature(first, plan)
        if plan.curvature_failure:
            problem.request = replace(problem.request, i2=False, exact=False)


def find_wrong_sample(problem: Problem, measured: Measured, count: int) -> int | None:
    """Compare ‖g_b‖² of a few samples, drawn at random, with those of the samples alone.

    Args:
        problem: The measurement; a sharded model is not checked.
        measured: Its result.
        count: Number of samples.

    Returns:
        The place of the first sample that differs in some parameter; None if all agree.
    """
    size = problem.batch.size
    if problem.shards is not None or size < 2:
        return None
    generator = torch.Generator().manual_seed(problem.draws.seed)
    for b in torch.randperm(size, generator=generator)[:count].tolist():
        if not _agrees(problem, measured, b):
            return b
    return None


def _agrees(problem: Problem, measured: Measured, b: int) -> bool:
    h = problem.forward(problem.batch[b : b + 1], unchecked=[])  # no GPU waits for the check
    if not h.requires_grad:
        return True
    types = types_of_gradients(problem, h)
    cotangent = label_cotangents(problem, slice(b, b + 1), h.detach()).vectors[0]
    gradients = vjp(
        [h], [cotangent.to(h.dtype)], list(problem.parameters.values()), retain_graph=False
    )
    moments = measured.moments["i1"].parameters
    zero = torch.zeros((), dtype=torch.float64)
    computed = torch.stack(
        [
            moments[n].squared_norms[b, 0].double() if n in moments else zero
            for n in problem.parameters
        ]
    )
    zero = torch.zeros((), dtype=torch.float64, device=h.device)
    expected = torch.stack([zero if g is None else _square(g).to(h.device) for g in gradients])
    expected = expected.to(computed.device)  # one transfer
    if not bool(torch.isfinite(expected).all()):
        check_finite(squared_norm(g) for g in gradients if g is not None)
    allowed = 2 * allowed_differences(expected, expected.max(), types)
    return bool(((computed - expected).abs() <= allowed).all())


def _square(g: Tensor) -> Tensor:
    """‖g‖², a float64 scalar."""
    values = g.coalesce().values() if g.is_sparse else g
    # without a float64 copy of the gradient, which would cost as much as the gradient itself
    return torch.linalg.vector_norm(at_least_float32(values)).double().square()
