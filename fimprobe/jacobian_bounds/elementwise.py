"""Functions that are written out in elementwise steps: their slope at this input."""

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
    net: AutogradGraph, edge: Edge, path: PathNorm, on_bias: Callable[[Tensor], None]
) -> list[tuple[Edge, PathNorm]]:
    """A function of one tensor in elementwise steps: its slope at this input; or a sum.

    Going back step by step, ``slope`` sums the derivatives over the paths and ``size`` their
    absolute values, which is what rounding errors are relative to. ``on_bias`` takes a bias that
    is added here and whose weight is frozen: it is a layer of its own.
    """
    counts: Counter[Any] = Counter()
    frontier: dict[Any, Edge] = {}
    biases: list[Tensor] = []
    seed = ones(edge)
    slope, size = {edge.node: seed}, {edge.node: seed}
    latest = edge
    while True:
        for parent, partial in zip(_parents(latest), _partials(latest), strict=True):
            leaf = net.parameter(parent)
            if leaf is not None:
                biases.append(leaf)
            if parent is None or leaf is not None:
                continue
            counts[parent.node] += 1
            known = frontier.setdefault(parent.node, parent)
            if parent.shape != edge.shape or known.nr != parent.nr:
                return _several(net, edge, path)
            for sums, term in (
                (slope, partial * slope[latest.node]),
                (size, partial.abs() * size[latest.node]),
            ):
                sums[parent.node] = sums.get(parent.node, 0) + term
        if len(frontier) <= 1:
            break
        latest = max(frontier.values(), key=lambda e: e.node._sequence_nr())
        inner = latest.kind in ELEMENTWISE or latest.kind in LIPSCHITZ
        if not inner or net.uses[latest.node] != counts[latest.node]:
            return _several(net, edge, path)
        del frontier[latest.node]
    bias = _bias(edge, biases)
    if bias is not None and _is_alone(net, bias):
        on_bias(bias)
    if not frontier:
        return []
    (parent,) = frontier.values()
    steepest, largest = slope[parent.node].abs(), size[parent.node]
    if bool((largest != 1).any()):
        steepest = steepest + largest * (margin_of(seed.dtype) - 1)
    factor = per_sample(net, steepest, path.outer)
    onward = replace(path, bias=bias, edges=counts[parent.node])
    return [(parent, scaled(net, onward, factor, edge))]


def _bias(edge: Edge, leaves: list[Tensor]) -> Tensor | None:
    """The one parameter that is added, if it may be a layer's bias."""
    added = edge.kind == "Add" and len(leaves) == 1 and edge.saved._saved_alpha == 1
    return leaves[0] if added and leaves[0].shape == edge.shape[-1:] else None


def _is_alone(net: AutogradGraph, bias: Tensor) -> bool:
    module = net.twin.get_submodule(net.owner(bias))
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def _parents(edge: Edge) -> list[Edge | None]:
    return [edge.parent(slot) for slot in range(len(edge.node.next_functions))]


def _partials(edge: Edge) -> tuple[Tensor, ...]:
    """An elementwise step's derivative in each of its arguments, by its own backward."""
    count = len(edge.node._input_metadata)
    seeds = [ones(edge) if nr == edge.nr else None for nr in range(count)]
    with torch.no_grad():
        found = edge.node(*seeds)
    return found if isinstance(found, tuple) else (found,)


def _several(net: AutogradGraph, edge: Edge, path: PathNorm) -> list[tuple[Edge, PathNorm]]:
    """An elementwise step that several functions meet at."""
    if edge.kind in ("Add", "Sub"):
        return branches(net, edge, replace(path, bias=None))
    if edge.kind in ("Mul", "Div"):
        raise Unbounded(f"two activations are multiplied {net.between(edge, path.above)}")
    raise Unbounded(net.unknown(edge, path.above))
