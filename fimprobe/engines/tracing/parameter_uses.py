"""The uses of each parameter, and uses that depend on each other's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.graph import nodes_behind
from fimprobe.engines.tracing.tape import FallbackCall, ParameterUse, Tape


@dataclass(frozen=True, kw_only=True)
class ParameterUses:
    """All uses of one parameter.

    Attributes:
        rule_uses: Uses under a rule.
        fallback_calls: Fallback calls, each with the parameter's name inside the module.
    """

    rule_uses: list[ParameterUse]
    fallback_calls: list[tuple[FallbackCall, str]]


def find_uses(chunk: Chunk) -> dict[str, ParameterUses]:
    """Find the uses of every parameter in a chunk's forward pass."""
    uses = {n: ParameterUses(rule_uses=[], fallback_calls=[]) for n in chunk.problem.parameters}
    for name, parameter in chunk.problem.parameters.items():
        if name not in chunk.plan.fallbacks:
            uses[name].rule_uses.extend(chunk.tape.uses.get(id(parameter), []))
    for assigned in chunk.fallbacks:
        for local_name, tensor in assigned.parameters.items():
            name = chunk.parameter_names[id(tensor)]
            uses[name].fallback_calls.append((assigned.call, local_name))
    return uses


def find_interacting_uses(tape: Tape, uses: dict[str, ParameterUses]) -> dict[str, set[str]]:
    """Find parameters of one layer with uses that depend on each other's outputs.

    Weight and bias of one call do not interact: its output is affine in both together. Uses in two
    calls interact if one call is computed from the other, as in a reused or a recurrent layer. Then
    R of the layer is not zero within the calls only.

    Args:
        tape: The recorded forward pass.
        uses: Uses of each parameter.

    Returns:
        For each parameter with interacting uses, the parameters of its layer that it interacts with.
        A parameter that is reused interacts with itself.
    """
    layers: dict[str, list[str]] = {}
    for name in uses:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    interacting: dict[str, set[str]] = {}
    for members in layers.values():
        rule_uses = [(n, use) for n in members for use in uses[n].rule_uses]
        calls = [(n, call) for n in members for call, _ in uses[n].fallback_calls]
        one_use = len({use.edge for _, use in rule_uses}) <= 1
        one_use = one_use and not any(use.per_step for _, use in rule_uses)
        one_call = not rule_uses and len({id(call) for _, call in calls}) <= 1
        if (one_use and not calls) or one_call:
            continue
        if calls:
            # several calls, or a call and a rule: what happens inside is unknown, so all interact
            for n in members:
                if uses[n].rule_uses or uses[n].fallback_calls:
                    interacting[n] = set(members)
            continue
        for n, m in _dependent_pairs(tape, rule_uses):
            interacting.setdefault(n, set()).add(m)
            interacting.setdefault(m, set()).add(n)
    return interacting


def _dependent_pairs(tape: Tape, rule_uses: list[tuple[str, ParameterUse]]) -> list[tuple[str, str]]:
    """Pairs of names where a use of the first is computed from the output of a use of the second."""
    pairs = []
    for n, use in rule_uses:
        below = _nodes_below(tape, use.input_edges)
        for m, other in rule_uses:
            edge = tape.output_edges[other.edge]
            if (id(edge) if isinstance(edge, Tensor) else edge.node) in below:
                pairs.append((n, m))
    return pairs


def _nodes_below(tape: Tape, input_edges: Sequence[int | None]) -> set[Any]:
    """Graph nodes, and ids of leaf tensors, that the inputs at these edges depend on."""
    edges = [tape.input_edges[index] for index in input_edges if index is not None]
    below: set[Any] = {id(edge) for edge in edges if isinstance(edge, Tensor)}
    for node in nodes_behind([edge.node for edge in edges if not isinstance(edge, Tensor)]):
        below.add(node)
        if hasattr(node, "variable"):
            below.add(id(node.variable))
    return below
