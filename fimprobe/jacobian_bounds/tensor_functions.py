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
    has_disjoint_windows,
    last,
    saved_dims,
)
from fimprobe.jacobian_bounds.path import PathNorm, Unbounded, outer_behind, per_sample, scaled
from fimprobe.jacobian_bounds.spectral_norm import ROUNDING


def copied_or_summed(graph: AutogradGraph, edge: Edge, parent: Edge, path: PathNorm) -> PathNorm:
    """The path behind a function whose outputs are copies or sums of inputs.

    Copies: s_max² is the largest number of copies of one input. Sums: s_max² ≤ ‖A‖₁ ‖A‖_∞.

    Args:
        graph: The autograd graph.
        edge: The function, of a kind in ``GATHERING`` or ``AVERAGING``.
        parent: The edge of its input.
        path: The path to its output.
    """
    touched = (GATHERING if edge.kind in GATHERING else AVERAGING)[edge.kind](
        edge.saved, len(parent.shape)
    )
    shape = list(edge.shape)
    if len(shape) > len(parent.shape):
        raise Unbounded(graph.unknown_function(edge, path.above))
    if len(shape) < len(parent.shape):  # a reduction without keepdim
        for dim in sorted(touched):
            shape.insert(dim, 1)
    outer = outer_behind(graph, edge, tuple(shape), parent.shape, touched, path)
    if has_disjoint_windows(edge):
        return scaled(graph, path, 1.0, edge, outer=outer)
    unit = ones(edge)
    if edge.kind in GATHERING:
        column_sums = _adjoint(edge, parent, unit)
        squared = per_sample(graph, column_sums, outer)
    else:
        unit.requires_grad_()
        column_sums = _adjoint(edge, parent, unit, create_graph=True)
        # A applied to ones, as the derivative of the linear map v ↦ 1ᵀ Aᵀ v
        (row_sums,) = torch.autograd.grad(column_sums, unit, torch.ones_like(column_sums))
        column_sums = column_sums.detach().abs()
        squared = per_sample(graph, column_sums, outer)
        squared = squared * per_sample(graph, row_sums.abs(), path.outer)
    return scaled(graph, path, squared.sqrt() * margin_of(unit.dtype), edge, outer=outer)


def normalised(graph: AutogradGraph, edge: Edge, path: PathNorm) -> PathNorm:
    """The path behind LayerNorm or GroupNorm.

    The derivative γ/σ (I − 11ᵀ/n − x̂x̂ᵀ/n) has norm ≤ max|γ|/σ.

    Args:
        graph: The autograd graph.
        edge: The normalisation, of kind "NativeLayerNorm" or "NativeGroupNorm".
        path: The path to its output.

    Raises:
        Unbounded: If it may couple the samples of the batch, or the factor is not finite.
    """
    node, shape = edge.saved, edge.shape
    group = edge.kind == "NativeGroupNorm"
    touched = set(range(1, len(shape)))
    if not group:
        touched = last(len(node._saved_normalized_shape))(node, len(shape))
    outer_behind(graph, edge, shape, shape, touched, path)
    scale = per_sample(graph, node._saved_result2.detach(), path.outer)
    if node._saved_weight is not None:
        scale = scale * float(node._saved_weight.detach().abs().max())
    return scaled(graph, path, scale * margin_of(node._saved_result2.dtype), edge)


def branches(graph: AutogradGraph, edge: Edge, path: PathNorm) -> list[tuple[Edge, PathNorm]]:
    """The arguments of a sum or concatenation, each with the norm of the path through it alone.

    If two branches join again, the propagation finds a fork.

    Args:
        graph: The autograd graph.
        edge: The sum or concatenation.
        path: The path to its output.

    Returns:
        The edge and the path of each argument, without constants and trained parameters.

    Raises:
        Unbounded: If an argument has another number of dimensions than the output, the samples of the
            batch cannot be separated, or a factor is not finite.
    """
    onward = []
    for slot in range(len(edge.node.next_functions)):
        parent = edge.parent(slot)
        if parent is None or graph.parameter(parent) is not None:
            continue
        if len(parent.shape) != len(edge.shape):
            raise Unbounded(graph.unknown_function(edge, path.above))
        concatenated = edge.kind == "Cat"
        touched = saved_dims(edge.saved, len(edge.shape)) if concatenated else set()
        outer = outer_behind(graph, edge, edge.shape, parent.shape, touched, path)
        factor = 1.0
        if not concatenated:  # s_max of a broadcast is the root of the number of copies
            factor = math.sqrt(math.prod(edge.shape) // math.prod(parent.shape)) * ROUNDING
            factor *= abs(edge.saved._saved_alpha) if slot == 1 else 1.0
        onward.append((parent, scaled(graph, path, factor, edge, outer=outer)))
    return onward


def ones(edge: Edge) -> Tensor:
    """A tensor of ones of the shape, type and device of the tensor at an edge."""
    metadata = edge.node._input_metadata[edge.nr]
    return torch.ones(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)


def margin_of(dtype: torch.dtype) -> float:
    """A factor that covers the rounding errors of a few operations in ``dtype``."""
    return 1 + 16 * torch.finfo(dtype).eps


def _adjoint(edge: Edge, parent: Edge, cotangent: Tensor, *, create_graph: bool = False) -> Tensor:
    """Aᵀ v for the operator A between two edges, all samples at once."""
    (product,) = torch.autograd.grad(
        [GradientEdge(edge.node, edge.nr)],
        [GradientEdge(parent.node, parent.nr)],
        [cotangent],
        retain_graph=True,
        create_graph=create_graph,
    )
    return product
