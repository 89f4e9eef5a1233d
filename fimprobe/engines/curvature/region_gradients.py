"""Cotangents of one vector at norms, and in regions with their graph: local second derivatives."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fimprobe.engines.curvature.graph_regions import Region
from fimprobe.engines.curvature.norm_curvature import NormNode
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.tracing.chunk import Chunk

_Leaving = dict[tuple[Any, int], Tensor]
"""Cotangents that operations pass to an argument, by the operation and the argument's number."""


@dataclass(frozen=True, kw_only=True)
class RegionGradients:
    """Cotangents at a region's entry and calls with their graph, for fixed cotangents at its exits.

    Attributes:
        region: The region.
        points: Its entry, if it has one, and the output edges of its calls.
        gradients: The cotangents at them; None where the region is straight.
    """

    region: Region
    points: list[Any]
    gradients: list[Tensor | None]

    def curvature_along(self, chosen: slice, signs: list[Tensor]) -> list[Tensor | None]:
        """Return Q w among some of the points; None for zero.

        Args:
            chosen: The points.
            signs: w at each.
        """
        points, gradients = self.points[chosen], self.gradients[chosen]
        bent = [(g, w) for g, w in zip(gradients, signs, strict=True) if g is not None]
        if not bent:
            return [None] * len(points)
        pulled = torch.autograd.grad(
            [g for g, _ in bent],
            points,
            [w for _, w in bent],
            retain_graph=True,
            allow_unused=True,
        )
        return list(pulled)


def pull_back_regions(
    chunk: Chunk, vector: Tensor, norms: list[NormNode], regions: list[Region]
) -> tuple[dict[NormNode, Tensor], list[RegionGradients]]:
    """Pull a vector at the outputs back through the graph, then again within each region.

    Args:
        chunk: The recorded forward pass.
        vector: The vector c [B, ...].
        norms: The norms of its graph.
        regions: The regions that bend.

    Returns:
        The cotangent at each norm's output that is reached, and the gradients of the regions.
    """
    at_norms, at_exits = _pull_back(chunk, vector, norms, regions)
    handles = [norm.node.register_hook(_stop) for norm in norms]
    try:
        local = [_within(region, chunk, vector, at_exits) for region in regions]
    finally:
        for handle in handles:
            handle.remove()
    return at_norms, [gradients for gradients in local if gradients is not None]


def _pull_back(
    chunk: Chunk, vector: Tensor, norms: list[NormNode], regions: list[Region]
) -> tuple[dict[NormNode, Tensor], _Leaving]:
    """Pull a vector back to all calls; returns the cotangents at norms and exits on the way."""
    at_norms: dict[NormNode, Tensor] = {}
    at_exits: _Leaving = {}

    def arrive(norm: NormNode, above: tuple[Tensor | None, ...]) -> None:
        if above[0] is not None:
            at_norms[norm] = above[0].detach()

    def leave(consumer: Any, passed: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> None:
        for argument, cotangent in enumerate(passed):
            if cotangent is not None:
                at_exits[consumer, argument] = cotangent.detach()

    consumers = {way.consumer for region in regions for way in region.exits} - {None}
    handles = [norm.node.register_prehook(functools.partial(arrive, norm)) for norm in norms]
    handles += [node.register_hook(functools.partial(leave, node)) for node in consumers]
    try:
        vjp([chunk.outputs], [vector], chunk.tape.output_edges)
    finally:
        for handle in handles:
            handle.remove()
    return at_norms, at_exits


def _within(
    region: Region, chunk: Chunk, vector: Tensor, at_exits: _Leaving
) -> RegionGradients | None:
    """Pull the cotangents at the exits of a region back to its entry and calls; None if straight."""
    leaving: dict[tuple[Any, int], Tensor] = {}
    for way in region.exits:
        cotangent = vector if way.consumer is None else at_exits.get((way.consumer, way.argument))
        if cotangent is not None:
            place = (way.edge.node, way.edge.output_nr)
            leaving[place] = leaving[place] + cotangent if place in leaving else cotangent
    points: list[Any] = [chunk.tape.output_edges[e] for e in region.calls]
    if region.norm is not None:
        points.insert(0, GradientEdge(region.norm.node, 0))
    if not leaving or not points:
        return None
    gradients = torch.autograd.grad(
        [GradientEdge(*place) for place in leaving],
        points,
        list(leaving.values()),
        create_graph=True,
        allow_unused=True,
    )
    bent = [g if g is not None and g.requires_grad else None for g in gradients]
    if all(g is None for g in bent):
        return None
    return RegionGradients(region=region, points=points, gradients=bent)


def _stop(passed: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
    """Pass zeros on: what lies behind a norm belongs to another region."""
    return tuple(None if g is None else torch.zeros_like(g) for g in passed)
