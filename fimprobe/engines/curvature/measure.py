"""Second derivatives R = Σ_a seed_a ∂²h_a of every parameter, by Hessian-vector products.

R's diagonal is probed at the layers' outputs z: with random signs v over all z, (Hv) at z is one
double backward, and (Σ_t v_to x_ti)(Σ_t (Hv)_to x_ti) is an unbiased ∂²/∂W_oi² (docs/theory.md,
"Second derivatives by probes").
R's norms are probed with directions u of the parameters. Within one call a layer's output is affine
in its parameters, so that only z bends: directions ẑ = ẑ(x; u) held fixed give the blocks exactly
where they are zero (piecewise-linear nets, last layers). ``whole`` moves all parameters at once.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fimprobe.engines.curvature.accumulator import CurvatureAccumulator
from fimprobe.engines.curvature.double_backward import DoubleBackward
from fimprobe.engines.curvature.parameter_derivatives import ParameterDerivatives
from fimprobe.engines.layers.per_sample import module_jvp
from fimprobe.engines.primitives.random_signs import random_direction, signs
from fimprobe.engines.problem.cotangents import Cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import batch_first, broadcast_over_batch, from_batch_first
from fimprobe.engines.tracing.parameter_uses import (
    Calls,
    ParameterUses,
    find_interacting_uses,
    find_uses,
)
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.smoothness import is_piecewise_linear
from fimprobe.engines.tracing.tape import Tape
from fimprobe.model.batch import Batch


def measure_curvature(
    problem: Problem,
    plan: Plan,
    tape: Tape,
    bender: DoubleBackward,
    seeds: Cotangents,
    rows: slice,
    batch: Batch,
    calls: Calls,
    names: dict[int, str],
    sums: dict[str, CurvatureAccumulator],
    seconds: dict[str, float],
) -> dict[str, set[str]]:
    """Add one chunk's second derivatives; returns which parameters of a layer meet each other.

    ``bender`` has taken the seeds; the first are those of the labels.
    """
    started = time.perf_counter()
    size, count, h = batch.size, len(seeds.seeds), bender.h
    exact = problem.draws.count is None
    site = find_uses(problem, plan, tape, batch, calls, names)
    partners = find_interacting_uses(problem, tape, site)
    meeting = set(partners) | {q for group in partners.values() for q in group}
    replayed = bender.replayed
    deltas = [bender.delta(y) for y in range(count)]
    assert seeds.weights is not None and seeds.weights.second is not None
    second = seeds.weights.second
    for name, s in sums.items():
        s.begin(size, count, second, exact, self_meeting=name in partners.get(name, ()))
    seed, first_sample = problem.draws.seed, problem.draws.first + rows.start
    labels = second.shape[1]  # the other seeds serve the bounds
    curved = count if exact else labels  # seeds whose diagonals are wanted
    # then each layer's own block of R is zero, unless it meets itself
    straight = not replayed and not partners and is_piecewise_linear(h, tape)
    if straight:
        for s in sums.values():
            s.add_zero_diagonal(None if problem.ask.exact else problem.ask.probes)
    elif not problem.ask.exact:
        # R's diagonal: K probes of random signs at the layers' outputs, others for every seed: their
        # noise averages out over labels too
        present = _present(deltas, len(tape.edges))
        for y in range(curved):
            first = [
                [
                    None
                    if d is None
                    else _signs_at(tape, e, d, f"diagonal {y} {k} {e}", seed, first_sample)
                    for e, d in enumerate(present)
                ]
                for k in range(problem.ask.probes)
            ]
            bent = [bender.bend(y, v, inputs=bool(partners)) for v in first]
            for name, s in sums.items():
                pull = ParameterDerivatives(problem, plan, site[name], name, size)
                s.add_diagonal(pull, y, first, bent, deltas[y], seed)
            del first, bent
    else:
        from fimprobe.engines import backpack

        wide = max(sum(p.numel() for p in problem.parameters.values()) * h.element_size(), 1)
        step = max(1, int(problem.memory_mb * 2**18 / wide))
        for y, one in enumerate(seeds.seeds[:curved]):
            for start in range(0, size, step):
                part = slice(start, min(start + step, size))
                found = backpack.hessian_diagonals(problem, batch[part], one[part], verified=True)
                for name, s in sums.items():
                    s.add_exact(y, found.get(name), part)
    share = (time.perf_counter() - started) * labels / curved
    seconds["i2 diagonal"] = seconds.get("i2 diagonal", 0.0) + share
    # R's norms: directions of the parameters, with and without flipped signs
    for j in range(problem.ask.probes if exact else 1):
        along = {
            n: random_direction(p, f"direction {j} {n}", seed) for n, p in problem.parameters.items()
        }
        # beside reuse, replayed parameters bend by their batch gradient: one flip for all samples
        flips = {
            n: signs((1,), f"flip {j} {n}", seed, dtype=h.dtype, device=h.device).expand(size)
            if site[n].calls and partners
            else signs(
                (size,), f"flip {j} {n}", seed, first=first_sample, dtype=h.dtype, device=h.device
            )
            for n in along
        }
        made: dict[tuple[str, int], Tensor] = {}
        live = _directions(problem, tape, site, along, None, calls, names, size, live=True, made=made)
        turned_live = (
            _directions(problem, tape, site, along, flips, calls, names, size, live=True)
            if partners
            else None
        )
        plain = _directions(problem, tape, site, along, None, calls, names, size, given=live)
        ahead = [bender.bend(y, plain, straight=straight) for y in range(count)]
        other = ahead
        if not straight:
            flipped = _directions(
                problem, tape, site, along, flips, calls, names, size, given=turned_live, made=made
            )
            other = [bender.bend(y, flipped, inputs=bool(partners)) for y in range(count)]
        for name, s in sums.items():
            pull = ParameterDerivatives(problem, plan, site[name], name, size, along, flips)
            s.add_block(pull, [ahead, other], deltas, flips[name])
        if replayed:  # their gradients bend with their inputs in ways of their own
            bound = _directions(
                problem, tape, site, along, None, calls, names, size, given=live, own=False
            )
            at_parameters: list[Tensor | None] = [along[n] for n, s in site.items() if s.calls]
            ahead = [bender.bend(y, bound, at_parameters) for y in range(count)]
        ahead = [bender.release(y, c, live) for y, c in enumerate(ahead)]
        if partners:
            if replayed:
                bound = _directions(
                    problem,
                    tape,
                    site,
                    along,
                    flips,
                    calls,
                    names,
                    size,
                    given=turned_live,
                    own=False,
                )
                at_parameters = [along[n] * flips[n][0] for n, s in site.items() if s.calls]
                other = [bender.bend(y, bound, at_parameters) for y in range(count)]
            assert turned_live is not None
            other = [bender.release(y, c, turned_live) for y, c in enumerate(other)]
        for name, s in sums.items():
            pull = ParameterDerivatives(problem, plan, site[name], name, size, along, flips)
            s.add_whole(pull, ahead, other if name in meeting else None, deltas)
        del ahead, other, live, turned_live, made
    return partners


def _present(deltas: list[list[Tensor | None]], edges: int) -> list[Tensor | None]:
    """For each edge, some δ that arrives there."""
    return [next((d[e] for d in deltas if d[e] is not None), None) for e in range(edges)]


def _signs_at(tape: Tape, edge: int, like: Tensor, key: str, seed: int, first: int) -> Tensor:
    """Random signs in the shape of what arrives at an edge."""
    layout = tape.layout_of[edge]
    shape = batch_first(like, layout, tape.batch_size).shape
    drawn = signs(shape, key, seed, first=first, dtype=like.dtype, device=like.device)
    return from_batch_first(drawn, layout)


def _directions(
    problem: Problem,
    tape: Tape,
    site: dict[str, ParameterUses],
    along: dict[str, Tensor],
    flips: dict[str, Tensor] | None,
    calls: Calls,
    names: dict[int, str],
    size: int,
    *,
    live: bool = False,
    given: list[Tensor | None] | None = None,
    own: bool = True,
    made: dict[tuple[str, int], Tensor] | None = None,
) -> list[Tensor | None]:
    """At each edge, its derivative along the parameters' directions within the call.

    ``live``: differentiable through the calls' inputs, without parameters of replayed calls.
    ``given``: such live directions, to be held fixed and completed with those parameters (``own``).
    ``made``: what each use gives without flips, noted where live and then taken from there.
    """
    found: list[Tensor | None] = [None] * len(tape.edges)

    def add(edge: int, v: Tensor, name: str, layout: int | str) -> None:
        if flips is not None:
            v = v * broadcast_over_batch(flips[name], v, layout)
        old = found[edge]
        found[edge] = v if old is None else old + v

    if given is not None:
        found = [None if v is None else v.detach() for v in given]
    with torch.enable_grad() if live else torch.no_grad():
        for name, s in site.items():
            if (live and s.calls) or (given is not None and not (own and s.calls)):
                continue
            for i, use in enumerate(s.uses):
                assert use.direction is not None
                v = None if made is None else made.get((name, i))
                if v is None:
                    v = use.direction(along[name])
                if made is not None and live:
                    made[name, i] = v.detach()
                add(use.edge, v, name, use.layout)
    if live or not own:
        return found
    for call, inside in calls:
        if call.path == "":
            continue
        for local, held in inside.items():
            name = names[id(held)]
            parts = module_jvp(call.module, {local: along[name]}, call.args, call.kwargs)
            for edge, v in zip(call.edges, parts, strict=True):
                if edge is not None and v is not None:
                    add(edge, v, name, 0)
    return found
