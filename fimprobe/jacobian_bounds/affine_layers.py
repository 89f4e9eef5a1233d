"""Layers in the autograd graph: the weight, its operator on one input, and the rows it multiplies."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fimprobe.jacobian_bounds.conv_geometry import ConvGeometry
from fimprobe.jacobian_bounds.graph import AFFINE, TRANSPOSING, AutogradGraph, Edge
from fimprobe.jacobian_bounds.input_norms import (
    InputNorms,
    bias_norms,
    convolution_input_norms,
    linear_input_norms,
)
from fimprobe.jacobian_bounds.operator_norms import OperatorNorms, convolution_norms, linear_norms


def operator_norms(
    graph: AutogradGraph, edge: Edge, *, compute_spectral: bool = True
) -> OperatorNorms | None:
    """Norms of a layer's operator on one input.

    Args:
        graph: The autograd graph; it keeps the norms of the twin's weights.
        edge: The layer, of a kind in ``AFFINE``.
        compute_spectral: Whether s_max is computed even if it is expensive.

    Returns:
        The norms; None for an operator that is not covered.
    """
    node, weight, parent = edge.node, weight_of(graph, edge), edge.parent(0)
    if weight is None or not weight.is_floating_point():
        return None
    convolution = edge.kind == "Convolution"
    positions = max(1, math.prod(edge.shape[: 1 if convolution else -1]) // graph.size)
    key: tuple[Any, ...] = (weight.data_ptr(), weight.shape, positions)
    if convolution:
        if node._saved_transposed or (parent is None and node._saved_input is None):
            return None
        geometry = geometry_on(node, node._saved_input if parent is None else parent)
        key = (*key, geometry, node._saved_groups)
    elif weight.dim() != 2:
        return None
    # the twin's parameters do not change during a measurement; computed weights may
    reusable = weight.data_ptr() in graph.addresses
    if reusable and (key in graph.norms):
        return graph.norms[key]
    if convolution:
        options = {
            "groups": node._saved_groups,
            "positions": positions,
            "compute_spectral": compute_spectral,
        }
        norms = convolution_norms(weight.detach(), geometry, **options)
    else:
        norms = linear_norms(weight.detach(), positions, compute_spectral=compute_spectral)
    if reusable and compute_spectral:
        graph.norms[key] = norms
    return norms


def input_norms(
    graph: AutogradGraph, edge: Edge, outer: int, weight: bool, bias: bool
) -> tuple[InputNorms, int]:
    """Norms of the rows X̃ that a layer multiplies, with a column of ones for the bias.

    Args:
        graph: The autograd graph.
        edge: The layer, of a kind in ``AFFINE`` (or any that adds a bias, if ``weight`` is false).
        outer: Elements before the batch in the layout of the layer's output.
        weight: Whether the weight is trained.
        bias: Whether a bias is trained.

    Returns:
        The norms [B], and how often each block of X̃ occurs in ∂z/∂W.
    """
    node, shape = edge.node, edge.shape
    layout = (outer, graph.size, -1)
    if edge.kind == "Convolution":
        out, groups = shape[1], node._saved_groups
        if not weight:
            positions = math.prod(shape) // (out * graph.size)
            return bias_norms(graph.size, positions, groups), out // groups
        x = node._saved_input.detach().unflatten(0, layout).transpose(0, 1).flatten(1, 2)
        norms = convolution_input_norms(x, geometry_on(node, x), groups=groups, bias=bias)
        return norms, out // groups
    if not weight:
        return bias_norms(graph.size, math.prod(shape[:-1]) // graph.size), shape[-1]
    name = {"Addmm": "_saved_mat1", "Mm": "_saved_self"}.get(edge.kind, "_saved_input")
    x = getattr(node, name).detach().flatten(0, -2)
    x = x.unflatten(0, layout).transpose(0, 1).flatten(1, 2)
    return linear_input_norms(x, weight=weight, bias=bias), shape[-1]


def weight_of(graph: AutogradGraph, edge: Edge) -> Tensor | None:
    """A layer's weight, transposed or not; None if autograd kept none.

    Args:
        graph: The autograd graph.
        edge: The layer, of a kind in ``AFFINE``.

    Returns:
        The weight as it is stored. A saved batch of matrices counts if they are one expanded matrix,
        or if there is only one; otherwise None.
    """
    node, slot = edge.node, edge.parent(AFFINE[edge.kind][1])
    if edge.kind == "Convolution":
        return slot.node.variable if slot and hasattr(slot.node, "variable") else node._saved_weight
    while slot is not None and slot.kind in TRANSPOSING:
        slot = slot.parent(0)
    if slot is not None and hasattr(slot.node, "variable"):
        matrix: Tensor | None = slot.node.variable
        return matrix
    saved: Tensor | None = node._saved_weight if edge.kind == "Linear" else node._saved_mat2
    if edge.kind == "Bmm" and saved is not None:
        # one frozen matrix that is expanded over the batch counts as a weight
        return saved[0] if saved.stride(0) == 0 or saved.shape[0] == 1 else None
    return saved


def geometry_on(node: Any, images: Tensor | Edge) -> ConvGeometry:
    """The geometry of a convolution on its input.

    Args:
        node: The convolution's backward node, with its kernel and options.
        images: The input [..., n₁, n₂, ...], or its edge; only the shape is read.
    """
    kernel = node._saved_weight.shape[2:]
    size = images.shape[len(images.shape) - len(kernel) :]
    return ConvGeometry.of(
        size, kernel, node._saved_stride, node._saved_padding, node._saved_dilation
    )
