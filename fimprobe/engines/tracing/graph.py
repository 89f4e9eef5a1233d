"""A walk over the autograd graph that finds parameters used where no rule or replay sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe.engines.tracing.tape import Tape


def nodes_behind(
    roots: Iterable[Any], cuts: Mapping[Any, list[Any]] = MappingProxyType({})
) -> Iterator[Any]:
    """Every node reached from the roots, once, jumping from the nodes in ``cuts`` to those listed."""
    seen: set[Any] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in cuts:
            stack.extend(cuts[node])
            continue
        yield node
        stack.extend(following for following, _ in node.next_functions)


def leaves_behind(root: Any, cuts: Mapping[Any, list[Any]] = MappingProxyType({})) -> set[int]:
    """Ids of the leaf tensors reached from ``root``."""
    nodes = nodes_behind([root], cuts)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def foreign_uses(
    outputs: Tensor, tape: Tape, parameters: Mapping[str, Tensor], replay: dict[str, str]
) -> tuple[set[str], set[str]]:
    """Parameters that the outputs depend on, and those among them used outside recorded calls.

    A parameter planned for replay is expected to be met outside.
    """
    everything = leaves_behind(outputs.grad_fn)
    outside = leaves_behind(outputs.grad_fn, tape.cuts)
    reached = {n for n, p in parameters.items() if id(p) in everything}
    foreign = {n for n in reached if id(parameters[n]) in outside and n not in replay}
    return reached, foreign


def hidden_reads(tape: Tape) -> dict[str, str]:
    """Replayed modules that read parameters neither their own nor among their inputs.

    Their gradients are right, but how these bend with what they read is not seen from inside.
    """
    found = {}
    for call in tape.replayed:
        inputs = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
        known = {id(x) for x in [*inputs, *call.module.parameters()]}
        cuts: dict[Any, list[Any]] = {x.grad_fn: [] for x in inputs if x.grad_fn is not None}
        nodes = [tape.edges[e].node for e in call.edges if e is not None]
        if any(leaves_behind(node, cuts) - known for node in nodes):
            found[call.path] = "it reads parameters of another module"
    return found


def gradient_types(outputs: Tensor) -> set[torch.dtype]:
    """Types of the gradients that pass through the graph behind ``outputs``."""
    found: set[torch.dtype] = {outputs.dtype}
    for node in nodes_behind([outputs.grad_fn]):
        found |= {kind for m in node._input_metadata if (kind := m.dtype).is_floating_point}
    return found
