"""Functions that are written in elementwise steps: their derivative at this input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.jacobian_bounds.graph import AutogradGraph, Edge
from fimprobe.jacobian_bounds.lipschitz_constants import ELEMENTWISE, LIPSCHITZ
from fimprobe.jacobian_bounds.path import PathNorm, Unbounded, per_sample, scaled
from fimprobe.jacobian_bounds.tensor_functions import branches, margin_of, ones


def elementwise(
    graph: AutogradGraph, edge: Edge, path: PathNorm, on_bias: Callable[[Tensor], None]
) -> list[tuple[Edge, PathNorm]]:
    """Bound a function that is written in elementwise steps, such as x · sigmoid(x).

    Step by step from its output, the derivative is summed over all paths to a common input. If there
    is none, the last step is a sum or product of several functions.

    Args:
        graph: The autograd graph.
        edge: The last step of the function.
        path: The path to its output.
        on_bias: Called with a bias that is added here and whose weight is frozen. Such a bias is a
            layer of its own.

    Returns:
        The edges behind the function, with the norms of the paths to them.

    Raises:
        Unbounded: If the function has several inputs and is not a sum.
    """
    counts: Counter[Any] = Counter()
    frontier: dict[Any, Edge] = {}
    biases: list[Tensor] = []
    unit = ones(edge)
    # the derivative, and the sum of the absolute values that rounding errors are relative to
    derivative, magnitude = {edge.node: unit}, {edge.node: unit}
    latest = edge
    while True:
        for parent, partial in zip(_arguments(latest), _partial_derivatives(latest), strict=True):
            leaf = graph.parameter(parent)
            if leaf is not None:
                biases.append(leaf)
            if parent is None or leaf is not None:
                continue
            counts[parent.node] += 1
            known = frontier.setdefault(parent.node, parent)
            if parent.shape != edge.shape or known.nr != parent.nr:
                return _several_functions(graph, edge, path)
            for sums, term in (
                (derivative, partial * derivative[latest.node]),
                (magnitude, partial.abs() * magnitude[latest.node]),
            ):
                sums[parent.node] = sums.get(parent.node, 0) + term
        if len(frontier) <= 1:
            break
        # the latest node of the forward pass: all paths through it are complete
        latest = max(frontier.values(), key=lambda e: e.node._sequence_nr())
        inner = latest.kind in ELEMENTWISE or latest.kind in LIPSCHITZ
        if not inner or graph.uses[latest.node] != counts[latest.node]:
            return _several_functions(graph, edge, path)
        del frontier[latest.node]
    bias = _added_bias(edge, biases)
    if bias is not None and _has_frozen_weight(graph, bias):
        on_bias(bias)
    if not frontier:
        return []
    (parent,) = frontier.values()
    steepest, largest = derivative[parent.node].abs(), magnitude[parent.node]
    if bool((largest != 1).any()):
        steepest = steepest + largest * (margin_of(unit.dtype) - 1)
    factor = per_sample(graph, steepest, path.outer)
    onward = replace(path, bias=bias, edges=counts[parent.node])
    return [(parent, scaled(graph, onward, factor, edge))]


def _added_bias(edge: Edge, leaves: list[Tensor]) -> Tensor | None:
    """The one parameter that is added here, if it may be the bias of a layer."""
    added = edge.kind == "Add" and len(leaves) == 1 and edge.saved._saved_alpha == 1
    return leaves[0] if added and leaves[0].shape == edge.shape[-1:] else None


def _has_frozen_weight(graph: AutogradGraph, bias: Tensor) -> bool:
    """Whether a bias belongs to a Linear layer whose weight is not trained."""
    module = graph.twin.get_submodule(graph.owner(bias))
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def _arguments(edge: Edge) -> list[Edge | None]:
    return [edge.parent(slot) for slot in range(len(edge.node.next_functions))]


def _partial_derivatives(edge: Edge) -> tuple[Tensor, ...]:
    """The derivative of an elementwise step in each of its arguments, by its own backward."""
    count = len(edge.node._input_metadata)
    cotangents = [ones(edge) if nr == edge.nr else None for nr in range(count)]
    with torch.no_grad():
        derivatives = edge.node(*cotangents)
    return derivatives if isinstance(derivatives, tuple) else (derivatives,)


def _several_functions(
    graph: AutogradGraph, edge: Edge, path: PathNorm
) -> list[tuple[Edge, PathNorm]]:
    """The branches of a sum of several functions; other combinations have no bound."""
    if edge.kind in ("Add", "Sub"):
        return branches(graph, edge, replace(path, bias=None))
    if edge.kind in ("Mul", "Div"):
        raise Unbounded(f"two activations are multiplied {graph.location(edge, path.above)}")
    raise Unbounded(graph.unknown_function(edge, path.above))
