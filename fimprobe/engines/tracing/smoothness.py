"""Places where the network is not twice differentiable: Î₂ needs activations in C²."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from fimprobe.engines.tracing.graph import nodes_behind
from fimprobe.engines.tracing.tape import Tape

_NODES = {
    "Abs", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "Aminmax", "Celu", "Clamp",
    "ClampMax", "ClampMin", "Cummax", "Cummin", "Elu", "Fmax", "Fmin", "FractionalMaxPool2D",
    "FractionalMaxPool3D", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Kthvalue",
    "LeakyRelu", "Max", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Maximum", "Median", "Min",
    "Minimum", "Nanmedian", "PreluKernel", "Relu", "RreluWithNoise", "Softshrink", "Sort",
    "Threshold", "Topk",
}  # fmt: skip


_MODULES = {
    "AdaptiveMaxPool1d": {"AdaptiveMaxPool2D"}, "AdaptiveMaxPool2d": {"AdaptiveMaxPool2D"},
    "AdaptiveMaxPool3d": {"AdaptiveMaxPool3D"}, "CELU": {"Celu"}, "ELU": {"Elu"},
    "FractionalMaxPool2d": {"FractionalMaxPool2D"}, "FractionalMaxPool3d": {"FractionalMaxPool3D"},
    "Hardshrink": {"Hardshrink"}, "Hardsigmoid": {"Hardsigmoid"}, "Hardswish": {"Hardswish"},
    "Hardtanh": {"Hardtanh"}, "LeakyReLU": {"LeakyRelu"}, "MaxPool1d": {"MaxPool2DWithIndices"},
    "MaxPool2d": {"MaxPool2DWithIndices"}, "MaxPool3d": {"MaxPool3DWithIndices"},
    "PReLU": {"PreluKernel"}, "RReLU": {"LeakyRelu", "RreluWithNoise"}, "ReLU": {"Relu"},
    "ReLU6": {"Hardtanh"}, "SELU": {"Elu"}, "Softshrink": {"Softshrink"},
    "Softsign": {"Abs"}, "Threshold": {"Threshold"},
}  # fmt: skip
"""The nodes that each module's forward records."""


def find_kinks(outputs: Tensor, model: nn.Module) -> list[str]:
    """Modules with kinks by class, then autograd nodes that no module of the model explains.

    ``["ReLU: 1, 3", "AmaxBackward (called as a function)"]``; empty for a network in C². A function
    that the model also has as a module (``F.relu`` beside ``nn.ReLU``) is taken for the module.
    """
    names = {
        re.sub(r"Backward\d*$", "", type(node).__name__) for node in nodes_behind([outputs.grad_fn])
    }
    found = names & _NODES
    modules: dict[str, list[str]] = {}
    explained: set[str] = set()
    for path, module in model.named_modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _MODULES), "")
        if found & _MODULES.get(kind, set()):
            explained |= _MODULES[kind]
            modules.setdefault(type(module).__name__, []).append(path or "the model itself")
    told = [f"{kind}: {', '.join(_few(paths))}" for kind, paths in sorted(modules.items())]
    return told + [f"{name}Backward (called as a function)" for name in sorted(found - explained)]


def _few(paths: list[str], most: int = 8) -> list[str]:
    return paths if len(paths) <= most else [*paths[:most], f"and {len(paths) - most} more"]


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


def is_piecewise_linear(outputs: Tensor, tape: Tape) -> bool:
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
