"""Curvature propagation against a double backward through the whole graph, along one direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fimprobe.engines.curvature.directions import OptionalTensors, random_edge_direction
from fimprobe.engines.curvature.graph_regions import Region
from fimprobe.engines.curvature.norm_curvature import NormNode, curvature_along
from fimprobe.engines.curvature.region_gradients import pull_back_regions
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.tracing.chunk import Chunk

TOLERANCE = {torch.float64: 1e-6}
"""Relative difference that rounding explains, by type; other types: a hundredth."""

NEGLIGIBLE = 1e-6
"""Share of the largest product below which one is not compared, in float32 and coarser types."""


def agrees_with_double_backward(
    chunk: Chunk, vectors: list[Tensor], norms: list[NormNode], regions: list[Region]
) -> bool:
    """Compare H v at all calls, for random signs v there and a sum of all vectors.

    The tangents of v at the entries of norms and regions come from differentiating ⟨v, δ⟩ with
    respect to the cotangents there, in which δ is linear. Each source then adds Q times its tangent.

    Args:
        chunk: The recorded forward pass.
        vectors: The vectors at the outputs, which get different factors: what bends for one of them
            then bends for the sum.
        norms: The norms of its graph.
        regions: The regions that bend.
    """
    vector = torch.stack([c / (y + 1) for y, c in enumerate(vectors)]).sum(0)
    edges = chunk.tape.output_edges
    heads = [GradientEdge(r.norm.node, 0) for r in regions if r.norm is not None]
    places = [*edges, *heads, *(norm.entry for norm in norms)]
    cotangents = vjp([chunk.outputs], [vector], places, create_graph=True)
    at_calls = cotangents[: len(edges)]
    signs: OptionalTensors = [
        None if d is None else random_edge_direction(chunk, e, d.detach(), f"check at {e}")
        for e, d in enumerate(at_calls)
    ]
    live = [
        (d, v)
        for d, v in zip(at_calls, signs, strict=True)
        if d is not None and v is not None and d.requires_grad
    ]
    if not live:
        return True
    sources = [d for d in cotangents[len(edges) :] if d is not None and d.requires_grad]
    whole: list[Tensor | None] = list(
        vjp([d for d, _ in live], [v for _, v in live], [*edges, *sources])
    )
    moving = iter(whole[len(edges) :])
    tangents: OptionalTensors = [
        next(moving) if d is not None and d.requires_grad else None for d in cotangents[len(edges) :]
    ]
    return _agree(whole[: len(edges)], _propagate(chunk, vector, norms, regions, signs, tangents))


def _propagate(
    chunk: Chunk,
    vector: Tensor,
    norms: list[NormNode],
    regions: list[Region],
    signs: OptionalTensors,
    tangents: OptionalTensors,
) -> OptionalTensors:
    """H v at all calls from the sources.

    Args:
        chunk: The recorded forward pass.
        vector: A vector at the outputs.
        norms: The norms of its graph.
        regions: The regions that bend.
        signs: v at the calls.
        tangents: Those of v at the entries of the regions that have one, then of the norms.
    """
    at_norms, local = pull_back_regions(chunk, vector, norms, regions)
    entered = [region.norm for region in regions if region.norm is not None]
    at_heads = dict(zip(entered, tangents, strict=False))
    places: list[Any] = []
    bends: list[Tensor] = []
    for norm, tangent in zip(norms, tangents[len(entered) :], strict=True):
        if norm in at_norms and tangent is not None:
            places.append(norm.entry)
            bends.append(curvature_along(norm, at_norms[norm], tangent))
    edges = chunk.tape.output_edges
    inside: OptionalTensors = [None] * len(edges)
    for gradients in local:
        calls = gradients.region.calls
        moves = [signs[e] for e in calls]
        if gradients.region.norm is not None:
            moves.insert(0, at_heads[gradients.region.norm])
        filled = [
            torch.zeros_like(g) if move is None and g is not None else move
            for g, move in zip(gradients.gradients, moves, strict=True)
        ]
        along = gradients.curvature_along(slice(None), filled)  # type: ignore[arg-type]
        if gradients.region.norm is not None:
            first, *along = along
            if first is not None:
                places.append(gradients.points[0])
                bends.append(first)
        for e, bend in zip(calls, along, strict=True):
            inside[e] = bend
    pulled: OptionalTensors = [None] * len(edges)
    if places:
        pulled = list(torch.autograd.grad(places, edges, bends, retain_graph=True, allow_unused=True))
    return [_sum(a, b) for a, b in zip(inside, pulled, strict=True)]


def _agree(expected: OptionalTensors, found: OptionalTensors) -> bool:
    """Whether both products are equal within rounding at every call."""
    sizes = [0.0 if x is None else float(x.double().norm()) for x in expected]
    largest = max(sizes)
    for x, y, size in zip(expected, found, sizes, strict=True):
        if x is None and y is None:
            continue
        like = x if x is not None else y
        assert like is not None
        difference = (0 if x is None else x.double()) - (0 if y is None else y.double())
        assert isinstance(difference, Tensor)
        is_double = like.dtype == torch.float64
        slack = (1e-12 if is_double else NEGLIGIBLE) * largest
        if not float(difference.norm()) <= TOLERANCE.get(like.dtype, 1e-2) * size + slack:
            return False
    return True


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
