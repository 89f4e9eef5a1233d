"""Moments of parameters without a rule, from modules that are re-evaluated on single samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.layers.per_sample import per_sample_vjp
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.moments.contraction import at_least_float32, sum_uses, use_deltas
from fimprobe.engines.problem.cotangents import Cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.chunk import AssignedCall, Chunk
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.tape import FallbackCall, Tape
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import batch_first


def assign_fallbacks(problem: Problem, plan: Plan, tape: Tape, batch: Batch) -> list[AssignedCall]:
    """Assign to each fallback call the parameters whose gradient it provides.

    A planned parameter belongs to the calls of the planned module. A parameter without a plan and
    without a rule belongs to the module that holds it.

    Args:
        problem: The model and its parameters.
        plan: The module planned for each parameter with a fallback.
        tape: The recorded forward pass.
        batch: Its samples.

    Returns:
        The calls with at least one parameter.
    """
    names = {id(p): n for n, p in problem.parameters.items()}
    calls = list(tape.fallback_calls)
    if "" in plan.fallbacks.values() or _root_needs_fallback(problem):
        calls.append(FallbackCall(path="", module=problem.twin, inputs=batch))
    assigned: list[AssignedCall] = []
    for call in calls:
        parameters: dict[str, Tensor] = {}
        rules = rules_for(call.module)
        for local_name, parameter in call.module.named_parameters():
            name = names.get(id(parameter))
            if name is None:
                continue
            planned = plan.fallbacks.get(name)
            if planned is None:
                belongs = "." not in local_name and local_name not in rules
            else:
                belongs = planned == call.path
            if belongs:
                parameters[local_name] = parameter
        if parameters:
            assigned.append(AssignedCall(call=call, parameters=parameters))
    return assigned


def _root_needs_fallback(problem: Problem) -> bool:
    """Whether the model itself, not one of its layers, holds parameters that no rule covers."""
    names = {n for n, p in problem.twin._parameters.items() if p is not None and p.requires_grad}
    return not names <= set(rules_for(problem.twin))


def accumulate_fallback_moments(
    chunk: Chunk,
    cotangents: Cotangents,
    deltas: list[list[Tensor] | None],
    accumulators: dict[str, MomentAccumulator],
) -> None:
    """Add the moments of parameters with a fallback, summed over all their uses first.

    Args:
        chunk: The recorded forward pass.
        cotangents: The S vectors at the outputs, and their weights.
        deltas: Cotangents [B, ...] by output edge, one for each vector; None at edges that none
            reaches.
        accumulators: The parameters' accumulators by name.
    """
    if not chunk.fallbacks:
        return
    vectors = torch.stack(cotangents.vectors, 1)
    unscaled = torch.ones((), dtype=torch.float64, device=vectors.device)
    step = _samples_at_once(chunk, len(cotangents.vectors))
    for start in range(0, chunk.size, step):
        samples = slice(start, min(start + step, chunk.size))
        totals: dict[str, Tensor] = {}
        for assigned in chunk.fallbacks:
            gradients = _per_sample_gradients(chunk, assigned, deltas, vectors, samples)
            for local_name, g in gradients.items():
                name = chunk.parameter_names[id(assigned.parameters[local_name])]
                g = at_least_float32(g)
                totals[name] = totals[name] + g if name in totals else g
        for name, total in totals.items():
            total = _add_rule_uses(chunk, name, total, deltas, samples)
            weights = None if cotangents.weights is None else cotangents.weights.rows(samples)
            where: Any = slice(None) if total.dim() > 2 else ...
            accumulator, total = accumulators[name], total.contiguous()
            # a CPU tries without a scale first; on a GPU the check would wait for the device
            on_cpu = total.device.type == "cpu"
            if not (on_cpu and accumulator.add(total, samples, where, weights)):
                accumulator.add(total, samples, where, weights, unscaled)


def _samples_at_once(chunk: Chunk, draws: int) -> int:
    """Number of samples whose gradients, of all parameters of a call, fit into the workspace.

    The gradients of several calls are alive together; a quarter of the calls is assumed.
    """
    largest = max(
        sum(p.numel() for p in assigned.parameters.values()) * draws * 4
        for assigned in chunk.fallbacks
    )
    bytes_per_sample = largest * max(1, len(chunk.fallbacks) // 4)
    return max(1, min(chunk.size, int(chunk.workspace_bytes / bytes_per_sample)))


def _add_rule_uses(
    chunk: Chunk, name: str, total: Tensor, deltas: list[list[Tensor] | None], samples: slice
) -> Tensor:
    """Add the gradients [b, S, *shape] of uses under a rule to those of fallback calls.

    A tied weight may be used by a layer and, directly, by a module without rules. A parameter with
    a planned fallback has no other uses.
    """
    if name in chunk.plan.fallbacks:
        return total
    parameter = chunk.problem.parameters[name]
    unscaled = torch.ones((), dtype=torch.float64, device=total.device)
    for use in chunk.tape.uses.get(id(parameter), []):
        delta = use_deltas(use, deltas, chunk.size)
        if delta is not None:
            uses = [(use, use.call, delta)]
            g = sum_uses(uses, samples, None, parameter.shape, unscaled)
            total = total + at_least_float32(g)
    return total


def _per_sample_gradients(
    chunk: Chunk,
    assigned: AssignedCall,
    deltas: list[list[Tensor] | None],
    vectors: Tensor,
    samples: slice,
) -> dict[str, Tensor]:
    """Per-sample gradients of a call's parameters, by their name inside the module.

    Args:
        chunk: The recorded forward pass.
        assigned: The call and its parameters.
        deltas: Cotangents by output edge.
        vectors: The vectors at the outputs [B, S, ...].
        samples: The b samples to evaluate.

    Returns:
        Gradients [b, S, *shape]; empty if no cotangent reaches the call.
    """
    call, problem, plan = assigned.call, chunk.problem, chunk.plan
    batch = call.inputs[samples]
    cotangents: list[Tensor | None]
    select: Any = None
    if call.path == "":
        cotangents = [vectors[samples]]
        select = lambda out: [problem.select_outputs(out)]  # noqa: E731
    else:
        cotangents = []
        for edge in call.output_edges:
            delta = None if edge is None else deltas[edge]
            stacked = None
            if delta is not None:
                rows = [batch_first(d, call.output_layout, chunk.size)[samples] for d in delta]
                stacked = torch.stack(rows, 1)
            cotangents.append(stacked)
        if all(d is None for d in cotangents):
            return {}
    parameters = {n: p.detach() for n, p in assigned.parameters.items()}
    for vectorize in (True, False) if call.path not in plan.unvectorized else (False,):
        try:
            return per_sample_vjp(
                call.module,
                parameters,
                batch,
                cotangents,
                select=select,
                output_layout=call.output_layout,
                vectorize=vectorize,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if vectorize:
                plan.unvectorized.add(call.path)  # not every operation can be vmapped
            elif call.path == "":
                raise
            else:
                # a table as long as the batch, or state that the first pass changed
                plan.unvectorized.discard(call.path)
                reason = "it does not run on single samples"
                raise PlanMismatch({call.path: reason}) from error
    raise AssertionError
