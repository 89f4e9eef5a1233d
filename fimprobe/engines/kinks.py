"""Places where the network is not twice differentiable: Î₂ needs activations in C² (slide 13)."""

from __future__ import annotations

import re

from torch import Tensor, nn

from fimprobe.engines.graph import nodes_behind

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
