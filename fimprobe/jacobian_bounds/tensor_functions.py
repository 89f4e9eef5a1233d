"""Functions between layers that act on a whole tensor: copies, sums, norms and branches."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fimprobe.jacobian_bounds.graph import AutogradGraph, Edge
from fimprobe.jacobian_bounds.lipschitz_constants import (
    AVERAGING,
    GATHERING,
    is_apart,
    last,
    saved_dims,
)
from fimprobe.jacobian_bounds.path import PathNorm, Unbounded, outer_behind, per_sample, scaled
from fimprobe.jacobian_bounds.spectral_norm import ROUNDING


def copied_or_summed(net: AutogradGraph, edge: Edge, parent: Edge, path: PathNorm) -> PathNorm:
    """Copies: s_max² is the largest number of copies. Sums: s_max² ≤ ‖A‖₁ ‖A‖_∞."""
    touched = (GATHERING if edge.kind in GATHERING else AVERAGING)[edge.kind](
        edge.saved, len(parent.shape)
    )
    shape = list(edge.shape)
    if len(shape) > len(parent.shape):
        raise Unbounded(net.unknown(edge, path.above))
    if len(shape) < len(parent.shape):  # the touched dimensions are gone
        for dim in sorted(touched):
            shape.insert(dim, 1)
    outer = outer_behind(net, edge, tuple(shape), parent.shape, touched, path)
    if is_apart(edge):
        return scaled(net, path, 1.0, edge, outer=outer)
    seed = ones(edge)
    if edge.kind in GATHERING:
        columns = pulled(edge, parent, seed)
        squared = per_sample(net, columns, outer)
    else:
        seed.requires_grad_()
        columns = pulled(edge, parent, seed, create_graph=True)
        (rows,) = torch.autograd.grad(columns, seed, torch.ones_like(columns))
        columns = columns.detach().abs()
        squared = per_sample(net, columns, outer) * per_sample(net, rows.abs(), path.outer)
    return scaled(net, path, squared.sqrt() * margin_of(seed.dtype), edge, outer=outer)


def normalised(net: AutogradGraph, edge: Edge, path: PathNorm) -> PathNorm:
    """LayerNorm, GroupNorm: the derivative γ/σ (I − 11ᵀ/n − x̂x̂ᵀ/n) has norm ≤ max|γ|/σ."""
    node, shape = edge.saved, edge.shape
    group = edge.kind == "NativeGroupNorm"
    touched = set(range(1, len(shape)))
    if not group:
        touched = last(len(node._saved_normalized_shape))(node, len(shape))
    outer_behind(net, edge, shape, shape, touched, path)
    scale = per_sample(net, node._saved_result2.detach(), path.outer)
    if node._saved_weight is not None:
        scale = scale * float(node._saved_weight.detach().abs().max())
    return scaled(net, path, scale * margin_of(node._saved_result2.dtype), edge)


def branches(net: AutogradGraph, edge: Edge, path: PathNorm) -> list[tuple[Edge, PathNorm]]:
    """A sum or concatenation: each branch by itself (what they share is met as a fork)."""
    onward = []
    for slot in range(len(edge.node.next_functions)):
        parent = edge.parent(slot)
        if parent is None or net.parameter(parent) is not None:
            continue
        if len(parent.shape) != len(edge.shape):
            raise Unbounded(net.unknown(edge, path.above))
        concatenated = edge.kind == "Cat"
        touched = saved_dims(edge.saved, len(edge.shape)) if concatenated else set()
        outer = outer_behind(net, edge, edge.shape, parent.shape, touched, path)
        factor = 1.0
        if not concatenated:  # s_max of a broadcast is the root of the number of copies
            factor = math.sqrt(math.prod(edge.shape) // math.prod(parent.shape)) * ROUNDING
            factor *= abs(edge.saved._saved_alpha) if slot == 1 else 1.0
        onward.append((parent, scaled(net, path, factor, edge, outer=outer)))
    return onward


def ones(edge: Edge) -> Tensor:
    """Of the tensor's shape."""
    metadata = edge.node._input_metadata[edge.nr]
    return torch.ones(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)


def pulled(edge: Edge, parent: Edge, seed: Tensor, *, create_graph: bool = False) -> Tensor:
    """Aᵀ seed for the operator A between two edges, all samples at once."""
    (gradient,) = torch.autograd.grad(
        [GradientEdge(edge.node, edge.nr)],
        [GradientEdge(parent.node, parent.nr)],
        [seed],
        retain_graph=True,
        create_graph=create_graph,
    )
    return gradient


def margin_of(dtype: torch.dtype) -> float:
    """What a few operations in ``dtype`` may take from a measured slope."""
    return 1 + 16 * torch.finfo(dtype).eps
