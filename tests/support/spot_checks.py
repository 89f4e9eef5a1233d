"""Spot checks at chosen entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.spot_checks.measure import SpotChecker
from fimprobe.engines.spot_checks.proposals import LayerProposal
from fimprobe.engines.spot_checks.slots import Slot
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import get_likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin
from fimprobe.statistics import SpotChecks


def spot_problem(
    model: nn.Module, inputs: Any, *, seed: int = 0, likelihood: str = "categorical"
) -> Problem:
    """A measurement of Î₁ with two labels, and V2 by spot checks."""
    return Problem(
        twin=make_twin(model),
        batch=Batch.of(inputs),
        likelihood=get_likelihood(likelihood),
        draws=Draws(count=2, seed=seed, size_biased=True),
        select_outputs=select_outputs,
        mask=None,
        memory_mb=512,
        diagonals=False,
        request=Request(i2=True, spot_checks=True),
    )


def spot_checks(problem: Problem, plan: Plan | None = None) -> SpotChecks:
    """The checks of a whole measurement."""
    measured = measure_with_fallbacks(problem, plan or make_verified_plan(problem))
    assert measured.spot_checks is not None
    return measured.spot_checks


def check_entries(
    problem: Problem, plan: Plan, entries: dict[str, list[int]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """V2 of some entries of each parameter for all inputs, {name: [B, entries]}."""
    size = problem.batch.size
    layers = {
        name: LayerProposal(inputs=torch.ones(size), parameters={name: 1.0}, entries={}, kind="")
        for name in entries
    }
    checker = SpotChecker(problem=problem, plan=plan, layers=layers, dtype=dtype)
    slots = [
        Slot(layer=name, parameter=name, row=row, entry=entry, weight=1.0)
        for name, of_parameter in entries.items()
        for entry in of_parameter
        for row in range(size)
    ]
    with checker.passes.forward.exact_kernels():
        checker.passes.record_baseline()
        found = {v.slot: v.value for v in checker.settle(checker.check(slots), 2)}
    values = torch.tensor([found[slot] for slot in slots], dtype=torch.float64)
    shapes = {name: len(of_parameter) for name, of_parameter in entries.items()}
    parts = values.split([n * size for n in shapes.values()])
    return {n: x.view(-1, size).T for n, x in zip(shapes, parts, strict=True)}
