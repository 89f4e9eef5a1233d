"""Spot checks after the chunks of a batch: their proposals come from the moments of Î₁."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.autograd.full_precision import HALF_TYPES
from fimprobe.engines.autograd.results import RunningResults
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.held_kinks import CannotHold
from fimprobe.engines.spot_checks.measure import measure_spot_checks
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError
from fimprobe.statistics import SpotChecks

HALF_PRECISION = (
    "the model computes in half precision, whose rounding hides second differences; pass "
    "second_order={'probes': 2}"
)
"""Why there are no spot checks."""


def run_spot_checks(problem: Problem, plan: Plan, run: RunningResults) -> SpotChecks:
    """Estimate V2 of every layer by spot checks.

    Args:
        problem: The measurement.
        plan: A verified plan.
        run: The results of all chunks.
    """
    notes = run.first_order_notes
    if notes.types & HALF_TYPES:
        return SpotChecks(strata=[], failure=HALF_PRECISION)
    dtype = torch.float32 if torch.float32 in notes.types else torch.float64
    squares, norms = _squares(run), _mean_norms(run)
    owners = {name: type(owner).__name__ for name, owner in problem.owners.items()}
    layers = notes.layers(owners, {n: squares[n] for n in problem.parameters}, norms)
    try:
        return measure_spot_checks(problem, plan, layers, dtype)
    except CannotHold as error:
        reason = str(error)
    except (FimprobeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's forward, on values that it has not seen
        reason = f"the forward raised {type(error).__name__} with a shifted entry: {error}"
    return SpotChecks(strata=[], failure=f"{reason}; pass second_order={{'probes': 2}}")


def _squares(run: RunningResults) -> dict[str, Tensor]:
    """Σ g² of every entry, by parameter."""
    return {name: a.result() for name, a in run.moments["i1"].accumulators.items()}


def _mean_norms(run: RunningResults) -> dict[str, Tensor]:
    """‖g_b‖² of every input [B], as the mean over draws, by parameter."""
    moments = run.moments["i1"]
    chunks = []
    for number, gram in enumerate(moments.grams):
        norms = gram.diagonal(dim1=2, dim2=3) if gram.dim() == 4 else gram  # [n, b, S]
        if "i1" in run.pass_weights:
            weights = run.pass_weights["i1"][number].square
            assert weights is not None
            chunks.append((norms * weights.double()).sum(2))
        else:
            chunks.append(norms.mean(2))
    return dict(zip(moments.accumulators, torch.cat(chunks, 1).cpu(), strict=True))
