"""Walks over the autograd graph: parameters that the outputs reach outside recorded calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe.engines.tracing.tape import Tape


def nodes_behind(
    roots: Iterable[Any], stops: Mapping[Any, list[Any]] = MappingProxyType({})
) -> Iterator[Any]:
    """Yield every node that the roots depend on, once.

    Args:
        roots: Nodes of the graph; None for constants.
        stops: Nodes that are not entered, with the nodes at which the walk continues instead.
    """
    seen: set[Any] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            stack.extend(stops[node])
            continue
        yield node
        stack.extend(following for following, _ in node.next_functions)


def leaves_behind(root: Any, stops: Mapping[Any, list[Any]] = MappingProxyType({})) -> set[int]:
    """Ids of the leaf tensors that a node depends on.

    Args:
        root: A node of the graph; None for a constant.
        stops: Nodes that are not entered, with the nodes at which the walk continues instead.
    """
    nodes = nodes_behind([root], stops)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def foreign_uses(
    outputs: Tensor, tape: Tape, parameters: Mapping[str, Tensor], fallbacks: dict[str, str]
) -> tuple[set[str], set[str]]:
    """Find the parameters that the outputs depend on, and those used outside recorded calls.

    A use outside, such as ``F.linear(x, layer.weight)``, would be missing from the gradient: the walk
    that jumps over recorded calls must not find any parameter. Parameters with a fallback may be
    found, because their gradient is not computed from recorded uses alone.

    Args:
        outputs: The outputs of the recorded forward pass.
        tape: Its tape.
        parameters: Trainable parameters by name.
        fallbacks: Parameters with a fallback.

    Returns:
        Names of the reached parameters, and of those among them with a use that is not recorded.
    """
    all_leaves = leaves_behind(outputs.grad_fn)
    outside_calls = leaves_behind(outputs.grad_fn, tape.stops)
    reached = {n for n, p in parameters.items() if id(p) in all_leaves}
    foreign = {n for n in reached if id(parameters[n]) in outside_calls and n not in fallbacks}
    return reached, foreign


def keeps_output(node: Any) -> bool:
    """Whether the backward of an operation reads what the operation returned, as that of tanh does.

    A kept output is the only kept tensor whose own node is ``node``.
    """
    try:
        return any(x.grad_fn is node for x in saved_tensors(node))
    except RuntimeError:  # freed, or overwritten by an in-place operation
        return True


def saved_tensors(node: Any) -> list[Tensor]:
    """The tensors that an operation keeps for its backward.

    Raises:
        RuntimeError: If one was freed, or overwritten by an in-place operation.
    """
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    saved += getattr(node, "saved_tensors", ())  # of a ``torch.autograd.Function``
    return [x for x in tree_leaves(saved) if isinstance(x, Tensor)]


def bypassed_outputs(outputs: Tensor, tape: Tape) -> dict[str, str]:
    """Find fallback modules whose output was copied, but is read by other ways than its return value.

    The copy's edge does not receive the whole cotangent then.

    Args:
        outputs: The outputs of the recorded forward pass.
        tape: Its tape.

    Returns:
        The reason by module path.
    """
    if not tape.separated:
        return {}
    reached = set(nodes_behind([outputs.grad_fn], tape.stops))
    return {
        path: "its output is read in other ways than as its return value"
        for node, path in tape.separated.items()
        if node in reached
    }


def hidden_reads(tape: Tape) -> dict[str, str]:
    """Find fallback modules that read parameters that are neither theirs nor among their inputs.

    Their gradients are right. Their second derivatives would miss a term, because a re-evaluation of
    the module does not see how the gradient changes with what it reads.

    Returns:
        The reason by module path.
    """
    reasons = {}
    for call in tape.fallback_calls:
        inputs = call.inputs.tensors()
        known = {id(x) for x in [*inputs, *call.module.parameters()]}
        stops: dict[Any, list[Any]] = {x.grad_fn: [] for x in inputs if x.grad_fn is not None}
        nodes = [tape.output_edges[e].node for e in call.output_edges if e is not None]
        if any(leaves_behind(node, stops) - known for node in nodes):
            reasons[call.path] = "it reads parameters of another module"
    return reasons


def gradient_types(outputs: Tensor) -> set[torch.dtype]:
    """Floating-point types of the gradients that pass through the graph of ``outputs``.

    A complex type counts as that of its parts.
    """
    types: set[torch.dtype] = {outputs.dtype}
    for node in nodes_behind([outputs.grad_fn]):
        parts = {m.dtype.to_real() for m in node._input_metadata}
        types |= {kind for kind in parts if kind.is_floating_point}
    return types
