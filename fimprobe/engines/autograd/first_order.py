"""One chunk of samples: its recorded forward, seeds pulled back through it, and what they yield."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.autograd.results import RunningResults
from fimprobe.engines.moments.accumulators import MomentAccumulators
from fimprobe.engines.moments.contraction import (
    Contraction,
    in_full_precision,
    is_outer,
    precise,
    reached_uses,
    vectors,
)
from fimprobe.engines.moments.fallback import accumulate_fallback_moments
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.problem.cotangents import Cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import batch_first
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.tape import Tape, check_inputs_unchanged


def accumulate_moments(
    chunk: Chunk,
    run: RunningResults,
    kind: str,
    seeds: Cotangents,
    h: Tensor,
    reached: set[str],
    last: bool = False,
    arrived: Sequence[Sequence[Tensor | None]] = (),
) -> set[str]:
    """Pull the seeds back and add each parameter's moments; returns the parameters met.

    ``arrived``: what came to the edges and sources of the first seeds, pulled back already.
    """
    problem, tape, size = chunk.problem, chunk.tape, chunk.batch.size
    inputs = problem.ask.bounds and kind == "i1"
    places = len(tape.edges) + (len(tape.sources) if inputs else 0)
    arrived = [
        *(parts[:places] for parts in arrived),
        *_backward(h, tape, seeds.seeds[len(arrived) :], inputs, last),
    ]
    deltas, sources = _stack_by_edge(arrived, len(tape.edges))
    check_inputs_unchanged(tape)
    reached = set(reached)
    ledger = run.ledger(kind, problem)
    ledger.begin(size, len(seeds.seeds))
    with torch.no_grad():
        stacks: dict[torch.Size, dict[str, Tensor]] = {}
        contraction = Contraction(size, seeds.weights, chunk.room)
        for name, parameter in problem.parameters.items():
            if name in chunk.pieces:
                continue
            uses = [] if name in chunk.plan.replay else tape.uses.get(id(parameter), [])
            met = reached_uses(uses, deltas, size)
            scatter = _scatter(problem, name)
            if met:
                reached.add(name)
                vector = all(use.rule.vector for use, _ in met)
                if scatter is None and vector and not is_outer(met):
                    stack = stacks.setdefault(parameter.shape, {})
                    stack[name] = vectors(in_full_precision(met), parameter.shape)
                    continue
            accumulator = ledger.accumulators[name]
            with accumulator.opened(scatter):
                again = name in chunk.plan.rescale
                if met and contraction.add(accumulator, met, rescale=again):
                    chunk.plan.rescale.add(name)
        for stack in stacks.values():
            ledger.add_small_parameters(list(stack), list(stack.values()), seeds.weights, chunk.room)
        accumulate_fallback_moments(
            problem,
            chunk.plan,
            tape,
            chunk.calls,
            chunk.pieces,
            deltas,
            seeds.seeds,
            ledger.accumulators,
            seeds.weights,
            chunk.names,
            chunk.batch,
            chunk.room,
        )
        if inputs:
            _add_activations(tape, run, sources, seeds, size)
    if seeds.seen is not None and kind == "i1":
        run.seen.append(seeds.seen)
    if seeds.weights is not None and seeds.weights.second is None:
        run.inverse_weights.append(seeds.weights.fourth)
    elif seeds.weights is not None:
        combined = len(seeds.seeds) if seeds.mix is None else seeds.mix.shape[1]
        run.weights.setdefault(kind, []).append(seeds.weights.padded(combined))
    return reached


def _scatter(problem: Problem, name: str) -> Callable[[Tensor], Any] | None:
    """Where the sums of a sharded parameter go: to the processes that hold its rows."""
    if problem.shards is None or name not in problem.shards:
        return None
    return functools.partial(problem.shards.scatter, name)


def add_ggn(chunk: Chunk, run: RunningResults) -> None:
    """Exact diagonals of F by BackPACK, stored as the moments of their roots."""
    from fimprobe.engines import backpack

    problem, size = chunk.problem, chunk.batch.size
    mask = None if problem.mask is None else problem.mask[chunk.rows]
    found = backpack.ggn_diagonals(problem, chunk.batch, mask=mask, verified=True)
    ledger = run.ledger("ggn", problem)
    ledger.begin(size, 1)
    for name in found:
        root = found[name].clamp(min=0).sqrt().unsqueeze(1)
        ledger.accumulators[name].add_all_samples(root, None)


def _add_activations(
    tape: Tape, run: RunningResults, sources: list[list[Tensor] | None], seeds: Cotangents, size: int
) -> None:
    """Moments of ∂ℓ/∂h of each layer's input h: Î₁(h) = mean (∂ℓ/∂h)(∂ℓ/∂h)ᵀ, eq. (19)."""
    gradients = {}
    for path, (index, layout) in tape.activations.items():
        found = sources[index]
        if found is not None:
            gradients[path] = torch.stack([precise(batch_first(d, layout, size)) for d in found], 1)
    if not gradients:
        return
    shapes = {path: g[0, 0] for path, g in gradients.items()}
    if run.activations is None:
        run.activations = MomentAccumulators.of(shapes)
    run.activations.include(shapes)
    run.activations.begin(size, len(seeds.seeds))
    for path, g in gradients.items():
        accumulator = run.activations.accumulators[path]
        if accumulator.a2.shape == g.shape[2:]:  # else another length in this chunk
            accumulator.add_all_samples(g, seeds.weights)


def _backward(
    h: Tensor, tape: Tape, seeds: list[Tensor], inputs: bool, last: bool
) -> list[Sequence[Tensor | None]]:
    """δ of each seed at every edge (and source): one backward each, never of the weights."""
    places = [*tape.edges, *(tape.sources if inputs else [])]
    if not places:
        return []
    collected: list[Sequence[Tensor | None]] = []
    for i, seed in enumerate(seeds):
        keep = not last or i < len(seeds) - 1
        collected.append(vjp([h], [seed], places, retain_graph=keep))
    return collected


Places = list[list[Tensor] | None]


def _stack_by_edge(arrived: Sequence[Sequence[Tensor | None]], edges: int) -> tuple[Places, Places]:
    """Of every edge, and of every source, what arrived of each seed; zeros where of some nothing."""
    by_place: Places = []
    for parts in zip(*arrived, strict=True):
        present = next((p for p in parts if p is not None), None)
        if present is None:
            by_place.append(None)
        else:
            by_place.append([torch.zeros_like(present) if p is None else p for p in parts])
    return by_place[:edges], by_place[edges:]
