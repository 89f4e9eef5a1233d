"""First-order pass over one chunk: cotangents pulled back to all edges, contracted to moments.

Symbols: b samples of the chunk, S vectors at the outputs, δ their cotangents at the outputs of calls.
"""

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
    at_least_float32,
    flat_gradients,
    in_full_precision,
    is_outer_product,
    reached_uses,
)
from fimprobe.engines.moments.fallback import accumulate_fallback_moments
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.problem.cotangents import Cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.tape import Tape, check_inputs_unchanged
from fimprobe.model.sample_dimension import batch_first

EdgeCotangents = list[list[Tensor] | None]
"""For each edge, one cotangent [b, ...] for each vector; None at edges that none reaches."""


def accumulate_moments(
    chunk: Chunk,
    run: RunningResults,
    kind: str,
    cotangents: Cotangents,
    known: Sequence[Sequence[Tensor | None]] = (),
    *,
    keep_graph: bool = True,
) -> EdgeCotangents:
    """Pull cotangents back and add each parameter's moments to the running results.

    Args:
        chunk: The recorded forward pass.
        run: The running results.
        kind: Kind of the cotangents, by which their moments are kept apart.
        cotangents: The vectors at the outputs, with the weights of their powers.
        known: For the first vectors, gradients at output and input edges, if already computed.
        keep_graph: Whether a later pass needs the graph.

    Returns:
        The cotangents at the output edges.
    """
    problem, num_vectors = chunk.problem, len(cotangents.vectors)
    # bounds of Î₁ use the gradients at the layers' inputs, for the label scores only
    with_inputs = problem.request.bounds and kind == "i1"
    num_edges = len(chunk.tape.output_edges)
    num_edges += len(chunk.tape.input_edges) if with_inputs else 0
    remaining = cotangents.vectors[len(known) :]
    gradients = [
        *(edges[:num_edges] for edges in known),
        *_pull_back(chunk, remaining, with_inputs=with_inputs, keep_graph=keep_graph),
    ]
    deltas, input_gradients = _stack_by_edge(gradients, len(chunk.tape.output_edges))
    check_inputs_unchanged(chunk.tape)
    accumulators = run.accumulators(kind, problem)
    accumulators.start_chunk(chunk.size, num_vectors)
    with torch.no_grad():
        _accumulate_rule_moments(chunk, run, accumulators, cotangents, deltas)
        accumulate_fallback_moments(chunk, cotangents, deltas, accumulators.accumulators)
        if with_inputs:
            _add_activations(chunk, run, input_gradients, cotangents)
    if cotangents.combinations is not None:
        accumulators.combine_cotangents(cotangents.combinations)
    _note_weights(run, kind, cotangents)
    return deltas


def _accumulate_rule_moments(
    chunk: Chunk,
    run: RunningResults,
    accumulators: MomentAccumulators,
    cotangents: Cotangents,
    deltas: EdgeCotangents,
) -> None:
    """Add the moments of parameters whose uses are all under rules.

    Small parameters of one shape are stacked: with many biases and norms, the number of operations
    counts more than their size.
    """
    problem, plan = chunk.problem, chunk.plan
    stacks: dict[torch.Size, dict[str, Tensor]] = {}
    contraction = Contraction(chunk.size, cotangents.weights, chunk.workspace_bytes)
    for name, parameter in problem.parameters.items():
        if name in chunk.fallback_parameters:
            continue
        uses = [] if name in plan.fallbacks else chunk.tape.uses.get(id(parameter), [])
        reached = reached_uses(uses, deltas, chunk.size)
        scatter = _scatter(problem, name)
        if reached:
            run.reached.add(name)
            is_small = all(use.rule.vector for use, _ in reached)
            if scatter is None and is_small and not is_outer_product(reached):
                stack = stacks.setdefault(parameter.shape, {})
                stack[name] = flat_gradients(in_full_precision(reached), parameter.shape)
                continue
        accumulator = accumulators.accumulators[name]
        # every process must enter the context of a sharded parameter, even without a gradient
        with accumulator.sharded_sums(scatter):
            rescale = name in plan.rescaled
            if reached and contraction.add(accumulator, reached, rescale=rescale):
                plan.rescaled.add(name)
    for stack in stacks.values():
        accumulators.add_small_parameters(
            list(stack), list(stack.values()), cotangents.weights, chunk.workspace_bytes
        )


def _note_weights(run: RunningResults, kind: str, cotangents: Cotangents) -> None:
    """Keep the chunk's weights, and for label scores their mass."""
    if cotangents.score_mass is not None and kind == "i1":
        run.score_mass.append(cotangents.score_mass)
    if cotangents.weights is None:
        return
    if cotangents.weights.square is None:  # drawn labels
        if cotangents.are_size_biased:
            run.inverse_weights.append(cotangents.weights.quartic)
        return
    count = len(cotangents.vectors)
    if cotangents.combinations is not None:
        count = cotangents.combinations.shape[1]
    run.pass_weights.setdefault(kind, []).append(cotangents.weights.padded(count))


def _scatter(problem: Problem, name: str) -> Callable[[Tensor], Any] | None:
    """Distributes a sharded parameter's sums to the processes that hold its rows; None if whole."""
    if problem.shards is None or name not in problem.shards:
        return None
    return functools.partial(problem.shards.scatter, name)


def add_ggn(chunk: Chunk, run: RunningResults) -> None:
    """Add exact diagonals of F by BackPACK, stored as the moments of their roots.

    Args:
        chunk: The recorded forward pass of b samples.
        run: The running results; receives moments of the kind "ggn".

    Raises:
        FimprobeError: For a likelihood without ``output_fisher``, or if one sample needs more than
            ``memory_mb``.
    """
    from fimprobe.engines import backpack  # its import has side effects

    problem = chunk.problem
    mask = None if problem.mask is None else problem.mask[chunk.rows]
    diagonals = backpack.ggn_diagonals(problem, chunk.batch, mask=mask, verified=True)
    accumulators = run.accumulators("ggn", problem)
    accumulators.start_chunk(chunk.size, 1)
    for name, diagonal in diagonals.items():
        root = diagonal.clamp(min=0).sqrt().unsqueeze(1)
        accumulators.accumulators[name].add_all_samples(root, None)


def _add_activations(
    chunk: Chunk, run: RunningResults, input_gradients: EdgeCotangents, cotangents: Cotangents
) -> None:
    """Add the moments of ∂ℓ/∂x of each layer's input x: Î₁(x) = mean (∂ℓ/∂x)(∂ℓ/∂x)ᵀ.

    See Soen & Sun (2021), eq. 19.
    """
    tape: Tape = chunk.tape
    gradients = {}
    for path, (index, layout) in tape.activations.items():
        at_input = input_gradients[index]
        if at_input is not None:
            samples_first = [at_least_float32(batch_first(d, layout, chunk.size)) for d in at_input]
            gradients[path] = torch.stack(samples_first, 1)
    if not gradients:
        return
    examples = {path: g[0, 0] for path, g in gradients.items()}
    if run.activations is None:
        run.activations = MomentAccumulators.of(examples)
    run.activations.include(examples)
    run.activations.start_chunk(chunk.size, len(cotangents.vectors))
    for path, g in gradients.items():
        accumulator = run.activations.accumulators[path]
        if accumulator.a2.shape == g.shape[2:]:  # sequences of this chunk may be longer or shorter
            accumulator.add_all_samples(g, cotangents.weights)


def _pull_back(
    chunk: Chunk, vectors: list[Tensor], *, with_inputs: bool, keep_graph: bool
) -> list[Sequence[Tensor | None]]:
    """Gradients of each vector at the output edges, and at the input edges if requested.

    One backward pass for each vector; gradients of the weights are never computed.
    """
    edges = [*chunk.tape.output_edges, *(chunk.tape.input_edges if with_inputs else [])]
    if not edges:
        return []
    gradients: list[Sequence[Tensor | None]] = []
    for i, vector in enumerate(vectors):
        retain_graph = keep_graph or i < len(vectors) - 1
        gradients.append(vjp([chunk.outputs], [vector], edges, retain_graph=retain_graph))
    return gradients


def _stack_by_edge(
    gradients: Sequence[Sequence[Tensor | None]], num_outputs: int
) -> tuple[EdgeCotangents, EdgeCotangents]:
    """Sort the gradients of S vectors by output edge and by input edge.

    A vector that does not reach an edge has zeros there, if another one does.
    """
    by_edge: EdgeCotangents = []
    for at_edge in zip(*gradients, strict=True):
        present = next((d for d in at_edge if d is not None), None)
        if present is None:
            by_edge.append(None)
        else:
            by_edge.append([torch.zeros_like(present) if d is None else d for d in at_edge])
    return by_edge[:num_outputs], by_edge[num_outputs:]
