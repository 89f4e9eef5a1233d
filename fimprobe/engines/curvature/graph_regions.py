"""The parts of the autograd graph between norms: regions that are entered through one norm only.

Every operation that depends on a recorded call either belongs to a norm, or to the region of the
nearest norm through which all ways from the inputs to it lead. In a transformer these are attention
and the MLP, each entered through its norm. Operations that no norm precedes on every way form the
region without an entry, such as the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fimprobe.engines.curvature.norm_curvature import NormNode, find_norms
from fimprobe.engines.tracing.smoothness import nodes_in_order
from fimprobe.engines.tracing.tape import Tape


@dataclass(frozen=True, kw_only=True)
class Exit:
    """A way out of a region.

    Attributes:
        edge: The place whose value leaves.
        consumer: The operation outside that reads it; None at the model's outputs.
        argument: The number of the consumer's argument.
    """

    edge: GradientEdge
    consumer: Any
    argument: int


@dataclass(kw_only=True)
class Region:
    """Operations between norms.

    Attributes:
        norm: The norm through whose output the region is entered; None if there is none.
        nodes: Its operations.
        calls: Indices of the output edges of recorded calls in it.
        exits: The ways out.
    """

    norm: NormNode | None
    nodes: set[Any] = field(default_factory=set)
    calls: list[int] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)


def find_regions(outputs: Tensor, tape: Tape) -> tuple[list[NormNode], list[Region]]:
    """Cut the graph at its norms.

    Args:
        outputs: The outputs of the recorded forward pass.
        tape: Its tape.

    Returns:
        The norms, and the regions that bend.
    """
    edges = _edges_by_node(tape)
    order: list[Any] = []
    depends: set[Any] = set()
    bent: set[Any] = set()
    for node, linear in nodes_in_order(outputs, tape):
        if node in edges or any(argument in depends for argument, _ in node.next_functions):
            depends.add(node)
            order.append(node)
            if not linear:
                bent.add(node)
    norms = find_norms(order)
    entered = _nearest_norms(order, depends, norms)
    while mixed := _mixed_norms(order, entered, norms, bent):
        norms = [norm for norm in norms if norm not in mixed]
        entered = _nearest_norms(order, depends, norms)
    members = {member for norm in norms for member in norm.members}
    regions: dict[NormNode | None, Region] = {}
    for node in order:
        if node not in members:
            region = regions.setdefault(entered[node], Region(norm=entered[node]))
            region.nodes.add(node)
            region.calls += edges.get(node, [])
    for consumer in order:
        for number, (node, output) in enumerate(consumer.next_functions):
            if node is None or node not in depends or node in members:
                continue
            region = regions[entered[node]]
            if consumer not in region.nodes:
                edge = GradientEdge(node, output)
                region.exits.append(Exit(edge=edge, consumer=consumer, argument=number))
    last = outputs.grad_fn
    if last is not None and last in depends and last not in members:
        edge = GradientEdge(last, outputs.output_nr)
        regions[entered[last]].exits.append(Exit(edge=edge, consumer=None, argument=0))
    return norms, [region for region in regions.values() if region.nodes & bent]


def _edges_by_node(tape: Tape) -> dict[Any, list[int]]:
    """Indices of the output edges at each node."""
    edges: dict[Any, list[int]] = {}
    for index, edge in enumerate(tape.output_edges):
        if isinstance(edge, Tensor):
            edge = leaf_edge(edge)
        edges.setdefault(edge.node, []).append(index)
    return edges


def leaf_edge(leaf: Tensor) -> GradientEdge:
    """Return the edge of a leaf tensor, at which its gradient is accumulated."""
    with torch.enable_grad():
        return get_gradient_edge(leaf)


def _mixed_norms(
    order: list[Any],
    entered: dict[Any, NormNode | None],
    norms: list[NormNode],
    bent: set[Any],
) -> set[NormNode]:
    """Norms behind which a region lies that leads into another one, where both bend together.

    Such a norm is an operation of the other region. Sums of residual streams do not bend.

    Args:
        order: Nodes that depend on a recorded call, each after its arguments.
        entered: The norm of each node's region.
        norms: The norms.
        bent: Nodes that are not linear in their arguments.
    """
    heads = {norm.node: norm for norm in norms}
    members = {member for norm in norms for member in norm.members}
    bent_regions = {entered[node] for node in bent - members}
    mixed = set()
    for node in order:
        region = entered[node]
        if node in members or region not in bent_regions:
            continue
        for argument, _ in node.next_functions:
            source = heads[argument] if argument in heads else entered.get(argument, region)
            if source is not None and source is not region:
                mixed.add(source)
    return mixed


def _nearest_norms(
    order: list[Any], depends: set[Any], norms: list[NormNode]
) -> dict[Any, NormNode | None]:
    """The last norm through which all ways to each node lead: dominators among norms.

    Args:
        order: Nodes that depend on a recorded call, each after its arguments.
        depends: The same nodes.
        norms: The norms.
    """
    heads = {norm.node: norm for norm in norms}
    nearest: dict[Any, NormNode | None] = {}
    depths: dict[NormNode | None, int] = {None: 0}
    for node in order:
        found: list[NormNode | None] = []
        for argument, _ in node.next_functions:
            if argument in depends:
                found.append(heads[argument] if argument in heads else nearest[argument])
        common = found[0] if found else None
        for other in found[1:]:
            while common is not other:
                if depths[common] >= depths[other]:
                    assert common is not None
                    common = nearest[common.node]
                else:
                    assert other is not None
                    other = nearest[other.node]
        nearest[node] = common
        if node in heads:
            depths[heads[node]] = depths[common] + 1
    return nearest
