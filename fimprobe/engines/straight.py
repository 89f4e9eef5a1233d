"""Whether the outputs are piecewise linear in the layers' outputs, proved from the autograd graph.

Then their second derivatives by what the layers put out are zero, and products with them need not
be computed: autograd would pull zeros through the whole graph. What is not known counts as curved.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from fimprobe.engines.tape import Tape

_PIECEWISE = {
    "Abs", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "Clamp", "ClampMax", "ClampMin",
    "Hardshrink", "Hardtanh", "LeakyRelu", "Max", "MaxPool2DWithIndices", "MaxPool3DWithIndices",
    "Min", "Relu", "Softshrink", "Threshold",
}  # fmt: skip
_LINEAR = {
    "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "Alias", "AsStrided", "AvgPool2D", "AvgPool3D",
    "Cat", "Clone", "ConstantPadNd", "Cumsum", "Diagonal", "Expand", "Flip", "Index", "IndexSelect",
    "MaskedFill", "Mean", "Neg", "Permute", "PixelShuffle", "PixelUnshuffle", "ReflectionPad1D",
    "ReflectionPad2D", "Repeat", "ReplicationPad1D", "ReplicationPad2D", "ReshapeAlias", "Roll",
    "Rsub", "Select", "Slice", "Split", "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy", "Transpose",
    "Unbind", "Unfold", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest2D", "View",
    "Where",
}  # fmt: skip
_PRODUCTS = {"Addmm", "Baddbmm", "Bmm", "Convolution", "Dot", "Linear", "Mm", "Mul", "Mv",
             "PreluKernel"}  # fmt: skip
_BATCH_NORMS = {"CudnnBatchNorm", "MiopenBatchNorm", "NativeBatchNorm"}


def piecewise_linear(outputs: Tensor, tape: Tape) -> bool:
    """Every node between the recorded outputs of layers and ``outputs`` is linear in them or has
    kinks: sums, views, products in which one factor depends on no layer, ReLU, max pooling, ...
    """
    edges = {e.node for e in tape.edges if not isinstance(e, Tensor)}
    leaves = {id(e) for e in tape.edges if isinstance(e, Tensor)}
    meets: dict[Any, bool] = {None: False}
    stack: list[tuple[Any, bool]] = [(outputs.grad_fn, False)]
    while stack:
        node, visited = stack.pop()
        if node in meets:
            continue
        slots = [following for following, _ in node.next_functions]
        if not visited:
            stack.append((node, True))
            stack.extend((s, False) for s in slots if s not in meets)
            continue
        below = [meets[s] for s in slots]
        own = node in edges or id(getattr(node, "variable", None)) in leaves
        if any(below) and not _straight(node, below):
            return False
        meets[node] = own or any(below)
    return True


def _straight(node: Any, below: list[bool]) -> bool:
    """One node; ``below`` tells which of its arguments depend on layers' outputs."""
    kind = re.sub(r"Backward\d*$", "", type(node).__name__)
    if kind in _PRODUCTS:  # a sum's term beside the product may depend on anything
        factors = below[1:] if kind in ("Addmm", "Baddbmm") else below
        return sum(factors) <= 1
    if kind == "Div":
        return not below[1] if len(below) > 1 else True
    if kind in _BATCH_NORMS:
        return not getattr(node, "_saved_training", True) and not any(below[1:])
    return kind in _PIECEWISE | _LINEAR
