"""Places where the network is not twice differentiable: Î₂ needs activations in C² (slide 13)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_NODES = {
    "Abs", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "Clamp", "ClampMax", "ClampMin",
    "Elu", "FractionalMaxPool2D", "FractionalMaxPool3D", "Hardshrink", "Hardsigmoid", "Hardswish",
    "Hardtanh", "LeakyRelu", "Max", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Maximum",
    "Median", "Min", "Minimum", "PreluKernel", "Relu", "RreluWithNoise", "Softshrink", "Sort",
    "Threshold", "Topk",
}  # fmt: skip
_MODULES = {
    "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "CELU", "ELU",
    "FractionalMaxPool2d", "FractionalMaxPool3d", "Hardshrink", "Hardsigmoid", "Hardswish",
    "Hardtanh", "LeakyReLU", "MaxPool1d", "MaxPool2d", "MaxPool3d", "PReLU", "RReLU", "ReLU",
    "ReLU6", "SELU", "Softshrink", "Threshold",
}  # fmt: skip


def find_kinks(outputs: Tensor, model: nn.Module) -> list[str]:
    """Modules with kinks by class, then autograd nodes where no module of the model explains them.

    ``["ReLU: 1, 3"]`` or ``["ReluBackward0 (called as a function)"]``; empty for a network in C².
    """
    names = {re.sub(r"Backward\d*$", "", type(node).__name__) for node in _nodes([outputs.grad_fn])}
    found = names & _NODES
    if not found:
        return []
    modules: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in _MODULES:
            modules.setdefault(type(module).__name__, []).append(path or "the model itself")
    if modules:
        return [f"{kind}: {', '.join(_few(paths))}" for kind, paths in sorted(modules.items())]
    return [f"{name}Backward (called as a function)" for name in sorted(found)]


def _few(paths: list[str], most: int = 8) -> list[str]:
    return paths if len(paths) <= most else [*paths[:most], f"and {len(paths) - most} more"]


def _nodes(stack: list[Any]) -> Iterable[Any]:
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)
