"""Layers as the graph shows them: a weight, its operator on one input, the rows it meets."""

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
    net: AutogradGraph, edge: Edge, *, compute_spectral: bool = True
) -> OperatorNorms | None:
    """Norms of a layer's operator on one input; s_max without ``compute_spectral`` only if cheap."""
    node, weight, parent = edge.node, weight_of(net, edge), edge.parent(0)
    if weight is None or not weight.is_floating_point():
        return None
    convolution = edge.kind == "Convolution"
    positions = max(1, math.prod(edge.shape[: 1 if convolution else -1]) // net.size)
    key: tuple[Any, ...] = (weight.data_ptr(), weight.shape, positions)
    if convolution:
        if node._saved_transposed or (parent is None and node._saved_input is None):
            return None
        window = window_on(node, node._saved_input if parent is None else parent)
        key = (*key, window, node._saved_groups)
    elif weight.dim() != 2:
        return None
    kept = weight.data_ptr() in net.stored  # the twin's parameters stay what they are
    if kept and (key in net.norms):
        return net.norms[key]
    if convolution:
        options = {
            "groups": node._saved_groups,
            "positions": positions,
            "compute_spectral": compute_spectral,
        }
        norms = convolution_norms(weight.detach(), window, **options)
    else:
        norms = linear_norms(weight.detach(), positions, compute_spectral=compute_spectral)
    if kept and compute_spectral:
        net.norms[key] = norms
    return norms


def input_norms(
    net: AutogradGraph, edge: Edge, outer: int, weight: bool, bias: bool
) -> tuple[InputNorms, int]:
    """Norms of X̃, and how often each of its blocks occurs in ∂z/∂W."""
    node, shape = edge.node, edge.shape
    layout = (outer, net.size, -1)
    if edge.kind == "Convolution":
        out, groups = shape[1], node._saved_groups
        if not weight:
            positions = math.prod(shape) // (out * net.size)
            return bias_norms(net.size, positions, groups), out // groups
        x = node._saved_input.detach().unflatten(0, layout).transpose(0, 1).flatten(1, 2)
        norms = convolution_input_norms(x, window_on(node, x), groups=groups, bias=bias)
        return norms, out // groups
    if not weight:
        return bias_norms(net.size, math.prod(shape[:-1]) // net.size), shape[-1]
    name = {"Addmm": "_saved_mat1", "Mm": "_saved_self"}.get(edge.kind, "_saved_input")
    x = getattr(node, name).detach().flatten(0, -2)
    x = x.unflatten(0, layout).transpose(0, 1).flatten(1, 2)
    return linear_input_norms(x, weight=weight, bias=bias), shape[-1]


def weight_of(net: AutogradGraph, edge: Edge) -> Tensor | None:
    """A layer's weight (transposed or not); None where autograd kept none."""
    node, slot = edge.node, edge.parent(AFFINE[edge.kind][1])
    if edge.kind == "Convolution":
        return slot.node.variable if slot and hasattr(slot.node, "variable") else node._saved_weight
    while slot is not None and slot.kind in TRANSPOSING:
        slot = slot.parent(0)
    if slot is not None and hasattr(slot.node, "variable"):
        matrix: Tensor | None = slot.node.variable
        return matrix
    saved: Tensor | None = node._saved_weight if edge.kind == "Linear" else node._saved_mat2
    if edge.kind == "Bmm" and saved is not None:  # one frozen matrix, expanded over the batch
        return saved[0] if saved.stride(0) == 0 or saved.shape[0] == 1 else None
    return saved


def window_on(node: Any, images: Tensor | Edge) -> ConvGeometry:
    """Where a convolution's kernel lies on images [..., n₁, n₂, ...]."""
    kernel = node._saved_weight.shape[2:]
    size = images.shape[len(images.shape) - len(kernel) :]
    return ConvGeometry.of(
        size, kernel, node._saved_stride, node._saved_padding, node._saved_dilation
    )
