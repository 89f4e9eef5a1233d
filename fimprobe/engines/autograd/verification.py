"""Decide and verify how each parameter is reached, on the batch's first samples.

The guard: samples run alone through the plain twin, with no hook and no rule, must give the same
outputs and the same squared gradients as the engine gives them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.autograd.engine import measure_moments
from fimprobe.engines.curvature.double_backward import use_differentiable_attention
from fimprobe.engines.layers.decompositions import UNROLLED
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.engines.problem.cotangents import label_cotangents
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.graph import gradient_types
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.tape import record
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Gaussian
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.fsdp import is_part
from fimprobe.statistics import Measured, MomentsBatch

FLOAT64_OUTPUT_COPIES = 4.5
"""Copies of the outputs in float64 that the guard holds at once, measured."""


Alone = tuple[Tensor, float] | None
"""A sample's gradient (of a sharded parameter, the rows held here) and its squared norm."""


def measure_with_fallbacks(problem: Problem, plan: Plan) -> Measured:
    """Moments; where the batch shows a use that the plan did not know, the plan is widened."""
    for _ in range(100):
        try:
            return measure_moments(problem, plan)
        except PlanMismatch as mismatch:
            if problem.shards is not None:
                told = "; ".join(f"{name!r}: {why}" for name, why in mismatch.reasons.items())
                raise FimprobeError(
                    "a sharded model (FSDP) is measured by the rules of its layers, which do not "
                    f"reach everything here ({told}); freeze what they do not, or do not shard"
                ) from None
            _fall_back_to_parent(problem, plan, mismatch.reasons)
    raise FimprobeError("no way was found to measure this model; please report it with the model")


def make_verified_plan(problem: Problem) -> Plan:
    """A plan on which the engine reproduces single samples; raises where none does."""
    size = _few(problem)
    problem = replace(
        problem,
        batch=problem.batch[:size],
        likelihood=Gaussian(),  # its scores are standard normal: seeds that leave nothing dark
        draws=Draws(1, seed=20240525),
        mask=None,
        diagonals=False,
        ask=Request(),
        shards=None if problem.shards is None else problem.shards.alone(),
    )
    coarse = _tolerance_of_dtype(problem)
    plan = Plan(layouts=_expansions(problem, coarse))
    alone, outputs = _single_sample_gradients(problem)
    with torch.no_grad():
        together = problem.forward(problem.batch).detach()
    if not torch.allclose(together, outputs, **_tolerance(outputs, coarse)):
        raise FimprobeError(
            "the model couples its samples: one sample alone gives other outputs than within the "
            "batch (differing by up to "
            f"{float((together - outputs).abs().max()):.2g}), so its Fisher information is not a "
            "mean over samples. Layers that use statistics of the batch in eval mode (BatchNorm "
            "with track_running_stats=False) or draw random numbers in eval mode cause it"
        )
    for _ in range(200):
        moments = measure_with_fallbacks(problem, plan).moments["i1"]
        wrong = _disagreeing(problem, moments, alone, coarse)
        if problem.shards is not None and not problem.shards.smallest(int(not wrong)):
            raise FimprobeError(
                "guard: per-sample gradients of the sharded model do not agree with those of single "
                f"samples ({', '.join(map(repr, wrong)) or 'on another process'}); please report it "
                "with the model"
            )
        if not wrong:
            plan.layouts.settled = True
            plan.chunk = None
            plan.verified = size
            return plan
        final = [name for name in wrong if plan.replay.get(name) == ""]
        if final:
            raise FimprobeError(
                f"guard: the per-sample gradients of {', '.join(map(repr, final))} do not agree "
                "with those of single samples; please report it with the model"
            )
        _fall_back_to_parent(problem, plan, dict.fromkeys(wrong, "guard"))
    raise FimprobeError("no way was found to measure this model; please report it with the model")


def check_curvature(problem: Problem, plan: Plan) -> None:
    """The guard of second derivatives: R u of single samples, by plain double backward, must agree.

    Where it does not, ``plan.uncurved`` says so and Î₂ is left out: no wrong number is reported.
    """
    size = _few(problem)
    ask = replace(problem.ask, i2=True, ih=False, labels=None, bounds=False, exact=False)
    small = replace(
        problem,
        batch=problem.batch[:size],
        likelihood=Gaussian(),
        draws=Draws(1, seed=20240525),
        mask=None,
        diagonals=False,
        ask=ask,
    )
    measured = measure_with_fallbacks(small, plan)
    plan.chunk, plan.curved = None, size
    if measured.curvature is None:
        plan.uncurved = measured.notes[0]
        return
    try:
        want = _single_sample_curvature(small)
    except (RuntimeError, NotImplementedError):
        return  # plain autograd has no second derivative of every parameter (EmbeddingBag): no check
    largest = max((float(w.max()) for w in want.values()), default=0.0)
    coarse = 5 * _tolerance_of_dtype(problem)
    wrong = []
    for name, norms in want.items():
        have = measured.curvature.parameters.get(name)
        found = torch.zeros_like(norms) if have is None else have.whole[0, :, 0]
        if bool(((found - norms).abs() > coarse * norms + coarse**2 * largest).any()):
            wrong.append(name)
    if wrong:
        plan.uncurved = (
            f"Î₂ was not measured: guard: second derivatives of {', '.join(wrong[:5])} do not agree "
            "with those of single samples; please report it with the model"
        )


def _few(problem: Problem) -> int:
    """Samples that the guard compares: three; two where three of many outputs pass the ceiling."""
    with torch.no_grad():
        wide = problem.forward(problem.batch[:1]).numel() * 8
    most = 3 if 3 * FLOAT64_OUTPUT_COPIES * wide <= problem.memory_mb * 2**20 else 2
    size = min(problem.batch.size, most)
    return size if problem.shards is None else problem.shards.smallest(size)


def _single_sample_curvature(problem: Problem) -> dict[str, Tensor]:
    """‖(R_b u)_θ‖² [B] of each parameter for the direction u that the engine took first."""
    parameters = list(problem.parameters.values())
    along = [
        random_direction(p, f"direction 0 {n}", problem.draws.seed)
        for n, p in problem.parameters.items()
    ]
    found: dict[str, list[Tensor]] = {n: [] for n in problem.parameters}
    for b in range(problem.batch.size):
        with use_differentiable_attention():
            h = problem.forward(problem.batch[b : b + 1])
            seeds = label_cotangents(problem, slice(b, b + 1), h.detach()).seeds
            bent: Any = [None] * len(parameters)
            if h.requires_grad:
                g = vjp([h], [seeds[0]], parameters, create_graph=True)
                parts = [
                    (x * u).sum()
                    for x, u in zip(g, along, strict=True)
                    if x is not None and x.requires_grad
                ]
                total = torch.stack(parts).sum() if parts else h.new_zeros(())
                if total.requires_grad:
                    bent = torch.autograd.grad(total, parameters, allow_unused=True)
        for name, r in zip(problem.parameters, bent, strict=True):
            zero = torch.zeros((), dtype=torch.float64)
            found[name].append(zero if r is None else r.double().square().sum().cpu())
    return {name: torch.stack(norms) for name, norms in found.items()}


def _expansions(problem: Problem, coarse: float) -> BatchLayouts:
    """Layouts with the lookups that may be expanded to the batch without changing the outputs."""
    layouts = BatchLayouts()
    with torch.no_grad():
        plain = problem.forward(problem.batch)
    try:
        with record(problem.twin, problem.batch.size, layouts, {}):
            expanded = problem.forward(problem.batch)
        if torch.allclose(plain, expanded.detach(), **_tolerance(plain, coarse)):
            return layouts if layouts.expand else BatchLayouts()
    except (RuntimeError, FimprobeError, ValueError, IndexError):
        if not layouts.expand:
            raise
    fresh = BatchLayouts()
    fresh.refused = set(layouts.expand)
    return fresh


def _single_sample_gradients(problem: Problem) -> tuple[dict[str, list[Alone]], Tensor]:
    """Gradients and outputs of each sample run alone, by plain autograd."""
    parameters = list(problem.parameters.values())
    found: dict[str, list[Alone]] = {name: [] for name in problem.parameters}
    outputs = []
    for b in range(problem.batch.size):
        h = problem.forward(problem.batch[b : b + 1])
        uniforms = problem.draws.uniforms_for(slice(b, b + 1), problem.batch.size, h.shape)
        label = problem.likelihood.quantile(h.detach(), uniforms[:, 0].to(h.device))
        seed = problem.likelihood.score(h.detach(), label).to(h.dtype)
        gradients: Mapping[str, Alone] = {}
        if h.requires_grad and problem.shards is not None:
            gradients = problem.shards.gradients(h, problem.parameters, seed)
        elif h.requires_grad:
            each = vjp([h], [seed], parameters, retain_graph=False)
            gradients = {
                name: None if g is None else (g, float(g.double().square().sum()))
                for name, g in zip(problem.parameters, each, strict=True)
            }
        for name in problem.parameters:
            found[name].append(gradients.get(name))
        outputs.append(h.detach())
    return found, torch.cat(outputs)


def _disagreeing(
    problem: Problem, moments: MomentsBatch, alone: dict[str, list[Alone]], coarse: float
) -> list[str]:
    """Parameters whose Σ_b g² per entry or ‖g_b‖² differ from the single samples'."""
    wrong = []
    expected = {}
    for name, gradients in alone.items():
        norms = torch.tensor([0.0 if g is None else g[1] for g in gradients], dtype=torch.float64)
        squares = sum(g[0].double().square() for g in gradients if g is not None)
        expected[name] = (squares, norms)
    largest = max((float(norms.max()) for _, norms in expected.values()), default=0.0)
    for name, (squares, norms) in expected.items():
        have = moments.parameters.get(name)
        slack = coarse**2 * largest  # gradients that are zero but for rounding
        if have is None:
            if float(norms.sum()) > slack:
                wrong.append(name)
            continue
        difference = (have.squared_norms[:, 0].cpu() - norms).abs()
        a2: Any = have.a2
        entries = ((a2.to_local() if is_part(a2) else a2).double() - squares).abs().sum()
        if bool((difference > coarse * norms + slack).any()) or float(entries) > coarse * float(
            norms.sum()
        ) + slack * len(norms):
            wrong.append(name)
    return wrong


def _tolerance_of_dtype(problem: Problem) -> float:
    """How far gradients may differ: by the coarsest type that the parameters or the forward use.

    Norms and softmaxes of language models compute in float32 whatever the parameters are.
    """
    kinds = {p.dtype for p in problem.parameters.values()}
    kinds |= gradient_types(problem.forward(problem.batch[:1]))
    if kinds & {torch.bfloat16, torch.float16}:
        return 0.2
    return 2e-3 if torch.float32 in kinds else 1e-7


def _tolerance(outputs: Tensor, coarse: float) -> dict[str, Any]:
    """The same for outputs."""
    rtol = coarse / 2
    return {"rtol": rtol, "atol": rtol * float(outputs.detach().abs().amax())}


def _fall_back_to_parent(problem: Problem, plan: Plan, reasons: dict[str, str]) -> None:
    """Move parameters to the next larger module around them; keys are parameters or modules."""
    names: set[str] = set()
    for key, reason in reasons.items():
        if key in problem.parameters:
            names.add(key)
            continue
        ids = {id(p) for p in problem.twin.get_submodule(key).parameters()}
        here = {n for n, p in problem.parameters.items() if id(p) in ids}
        direct = {n for n in here if plan.replay.get(n, key) == key}
        if not direct:
            raise FimprobeError(f"module {key!r} cannot be recorded: {reason}")
        for name in direct:  # a module that cannot be recorded cannot be replayed either
            plan.replay.setdefault(name, key)
        names |= direct
    for name in names:
        plan.replay[name] = _parent_module(problem, plan, name)


def _parent_module(problem: Problem, plan: Plan, name: str) -> str:
    site = plan.replay.get(name)
    if site == "":
        raise FimprobeError(f"parameter {name!r} cannot be reached even from the whole model")
    if site is not None:
        return site.rpartition(".")[0]
    parameter = problem.parameters[name]
    owners = [
        path
        for path, module in problem.twin.named_modules()
        if any(p is parameter for p in module._parameters.values())
    ]
    common = owners[0].split(".") if owners[0] else []
    for owner in owners[1:]:
        parts = owner.split(".")
        shared = 0
        while shared < min(len(common), len(parts)) and common[shared] == parts[shared]:
            shared += 1
        common = common[:shared]
    module = problem.twin.get_submodule(".".join(common))
    tried = len(owners) == 1 and name.rpartition(".")[2] not in rules_for(module)
    if tried and type(module) not in UNROLLED:
        return ".".join(common[:-1])
    return ".".join(common)
