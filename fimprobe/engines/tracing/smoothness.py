"""Kinks, where a network is not twice differentiable, and networks that are piecewise linear.

Î₂ needs activations in C². See docs/theory.md, "Piecewise linear networks".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
"""Autograd nodes of functions with kinks."""


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
    """List modules with kinks by class, then autograd nodes that no module explains.

    A function that the model also has as a module (``F.relu`` next to ``nn.ReLU``) is
    not distinguishable from it in the graph, and is attributed to the module.

    Args:
        outputs: The outputs, with their graph.
        model: The model that computed them.

    Returns:
        ``["ReLU: 1, 3", "AmaxBackward (called as a function)"]``; empty for a network in C².
    """
    nodes = {_function_name(node) for node in nodes_behind([outputs.grad_fn])}
    kinks = nodes & _NODES
    paths: dict[str, list[str]] = {}
    explained: set[str] = set()
    for path, module in model.named_modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _MODULES), "")
        if kinks & _MODULES.get(kind, set()):
            explained |= _MODULES[kind]
            paths.setdefault(type(module).__name__, []).append(path or "the model itself")
    descriptions = [f"{kind}: {', '.join(_shorten(p))}" for kind, p in sorted(paths.items())]
    unexplained = sorted(kinks - explained)
    return descriptions + [f"{name}Backward (called as a function)" for name in unexplained]


def _function_name(node: Any) -> str:
    """Name of a node's function: "Relu" for ReluBackward0."""
    return re.sub(r"Backward\d*$", "", type(node).__name__)


def _shorten(paths: list[str], limit: int = 8) -> list[str]:
    return paths if len(paths) <= limit else [*paths[:limit], f"and {len(paths) - limit} more"]


_PIECEWISE = {
    "Abs", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "Clamp", "ClampMax", "ClampMin",
    "Hardshrink", "Hardtanh", "LeakyRelu", "Max", "MaxPool2DWithIndices", "MaxPool3DWithIndices",
    "Min", "Relu", "Softshrink", "Threshold",
}  # fmt: skip
"""Nodes that are linear between their kinks."""

_LINEAR = {
    "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "Alias", "AsStrided", "AvgPool2D", "AvgPool3D",
    "Cat", "Clone", "ConstantPadNd", "Cumsum", "Diagonal", "Expand", "Flip", "Index", "IndexSelect",
    "MaskedFill", "Mean", "Neg", "Permute", "PixelShuffle", "PixelUnshuffle", "ReflectionPad1D",
    "ReflectionPad2D", "Repeat", "ReplicationPad1D", "ReplicationPad2D", "ReshapeAlias", "Roll",
    "Rsub", "Select", "Slice", "Split", "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy", "Transpose",
    "Unbind", "Unfold", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest2D", "View",
    "Where",
}  # fmt: skip
"""Nodes that are linear in all their arguments together."""

_PRODUCTS = {"Addmm", "Baddbmm", "Bmm", "Convolution", "Dot", "Linear", "Mm", "Mul", "Mv",
             "PreluKernel"}  # fmt: skip
"""Nodes that are linear in one factor if the other one is constant."""

_BATCH_NORMS = {"CudnnBatchNorm", "MiopenBatchNorm", "NativeBatchNorm"}
"""Nodes that are linear in their input in eval mode."""


def is_piecewise_linear(outputs: Tensor, tape: Tape) -> bool:
    """Whether the outputs are piecewise linear in all recorded outputs of layers together.

    Then no second derivative exists between layers, and R has zero blocks. Every node between the
    layers' outputs and ``outputs`` must be linear or have kinks: sums, views, ReLU, max pooling, or a
    product with at most one factor that depends on a layer.

    Args:
        outputs: The outputs of the recorded forward pass.
        tape: Its tape.
    """
    return all(linear for _, linear in nodes_in_order(outputs, tape))


def straight_edges(outputs: Tensor, tape: Tape) -> set[int]:
    """Find the layers' outputs in which the outputs are piecewise linear, each for itself.

    A parameter in which a layer's output is affine then has no second derivative by that use: untied
    last layers, and the norm before them.

    Args:
        outputs: The outputs of the recorded forward pass.
        tape: Its tape.

    Returns:
        Indices of output edges. An edge is left out if a product on its way has two factors that
        depend on layers, even if only one depends on it.
    """
    bent: set[Any] = set()
    for node, linear in reversed(list(nodes_in_order(outputs, tape))):
        if node in bent or not linear:
            bent.update(following for following, _ in node.next_functions)
    bent_leaves = {id(node.variable) for node in bent if hasattr(node, "variable")}
    return {
        index
        for index, edge in enumerate(tape.output_edges)
        if (id(edge) not in bent_leaves if isinstance(edge, Tensor) else edge.node not in bent)
    }


def nodes_in_order(outputs: Tensor, tape: Tape) -> Iterator[tuple[Any, bool]]:
    """Yield each node after its arguments, and whether it is piecewise linear in layers' outputs."""
    edge_nodes = {e.node for e in tape.output_edges if not isinstance(e, Tensor)}
    edge_leaves = {id(e) for e in tape.output_edges if isinstance(e, Tensor)}
    depends: dict[Any, bool] = {None: False}  # whether a node depends on a layer's output
    stack: list[tuple[Any, bool]] = [(outputs.grad_fn, False)]
    while stack:  # depth first, without recursion: graphs are deeper than Python's stack
        node, visited = stack.pop()
        if node in depends:
            continue
        arguments = [following for following, _ in node.next_functions]
        if not visited:
            stack.append((node, True))
            stack.extend((a, False) for a in arguments if a not in depends)
            continue
        dependent = [depends[a] for a in arguments]
        is_edge = node in edge_nodes or id(getattr(node, "variable", None)) in edge_leaves
        depends[node] = is_edge or any(dependent)
        yield node, not any(dependent) or _is_linear(node, dependent)


def _is_linear(node: Any, dependent: list[bool]) -> bool:
    """Whether a node is piecewise linear in its arguments that depend on a layer's output."""
    kind = _function_name(node)
    if kind in _PRODUCTS:  # the term that is added to the product may depend on anything
        factors = dependent[1:] if kind in ("Addmm", "Baddbmm") else dependent
        return sum(factors) <= 1
    if kind == "Div":
        return not dependent[1] if len(dependent) > 1 else True
    if kind in _BATCH_NORMS:
        return not getattr(node, "_saved_training", True) and not any(dependent[1:])
    return kind in _PIECEWISE | _LINEAR
