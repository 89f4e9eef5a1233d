"""Lipschitz constants and kinds of the functions between layers, by name of their backward node."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from fimprobe.jacobian_bounds.graph import Edge, signed

LIPSCHITZ: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(
        [
            "Relu",
            "Tanh",
            "LogSigmoid",
            "Softplus",
            "Hardtanh",
            "Softshrink",
            "Hardshrink",
            "Threshold",
        ],
        lambda node: 1.0,
    ),
    **dict.fromkeys(
        ["Clamp", "ClampMin", "ClampMax", "Abs", "Neg", "Sin", "Cos", "Atan"], lambda n: 1.0
    ),
    "Sigmoid": lambda node: 0.25,
    "Hardsigmoid": lambda node: 0.16666668,  # torch rounds 1/6 to float32, up
    "Hardswish": lambda node: 1.5,
    "Gelu": lambda node: 1.12890415 if node._saved_approximate == "none" else 1.12899307,
    "Silu": lambda node: 1.09983933,
    "Mish": lambda node: 1.08849817,
    "Erf": lambda node: 1.12837917,
    "Elu": lambda node: (
        abs(node._saved_scale) * max(1.0, abs(node._saved_alpha * node._saved_input_scale))
    ),
    "Celu": lambda node: 1.0 if node._saved_alpha > 0 else math.inf,
    "LeakyRelu": lambda node: max(1.0, abs(node._saved_negative_slope)),
    "RreluWithNoise": lambda node: max(1.0, abs(node._saved_lower + node._saved_upper) / 2),
    "PreluKernel": lambda node: max(1.0, float(node._saved_weight.detach().abs().max())),
}
"""Lipschitz constants of activations, rounded up."""

ELEMENTWISE = {"Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Exp", "Log", "Log1P", "Sqrt", "Rsqrt",
             "Reciprocal", "Where", "MaskedFill", "Expm1", "Sign"}  # fmt: skip
"""Steps of which activations are written by hand."""

BATCH_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}


def last(count: int) -> Callable[[Any, int], set[int]]:
    """A function that returns the last ``count`` dimensions, from a node and the number of them."""
    return lambda node, dims: set(range(max(0, dims - count), dims))


def saved_dims(node: Any, dims: int) -> set[int]:
    """The dimensions that a node saved; all of them if it saved none.

    Args:
        node: The backward node of a function.
        dims: Number of dimensions of the tensor that it acts on.
    """
    for name in ("_saved_dim", "_saved_dims"):
        if hasattr(node, name):
            saved = getattr(node, name)
            return {signed(d) % dims for d in (saved if isinstance(saved, tuple) else (saved,))}
    return set(range(dims))


GATHERING: dict[str, Callable[[Any, int], set[int]]] = {
    **{f"MaxPool{d}DWithIndices": last(d) for d in (2, 3)},
    **{f"AdaptiveMaxPool{d}D": last(d) for d in (2, 3)},
    **{f"{kind}Pad{d}D": last(d) for kind in ("Reflection", "Replication") for d in (1, 2, 3)},
    **{f"UpsampleNearest{exact}{d}D": last(d) for exact in ("", "Exact") for d in (1, 2, 3)},
    "ConstantPadNd": lambda node, dims: last(len(node._saved_pad) // 2)(node, dims),
    "PixelShuffle": last(3),
    "PixelUnshuffle": last(3),
    "ChannelShuffle": lambda node, dims: {1},
    **dict.fromkeys(["Slice", "Select", "Flip", "IndexSelect"], saved_dims),
    **dict.fromkeys(["Expand", "Repeat"], lambda node, dims: set()),
}
"""Functions whose outputs are copies of one input or 0: the dimensions of the input they act on."""

AVERAGING: dict[str, Callable[[Any, int], set[int]]] = {
    **{f"AvgPool{d}D": last(d) for d in (2, 3)},
    **{f"AdaptiveAvgPool{d}D": last(d) for d in (2, 3)},
    "UpsampleLinear1D": last(1),
    "UpsampleBilinear2D": last(2),
    "UpsampleTrilinear3D": last(3),
    **dict.fromkeys(["Mean", "Sum", "Amax", "Amin", "Max"], saved_dims),
}
"""Functions whose outputs are sums of inputs with coefficients of one sign: the same dimensions."""


def has_disjoint_windows(edge: Edge) -> bool:
    """Whether a function is a max pooling whose windows have no input in common."""
    node = edge.saved
    if not re.fullmatch(r"MaxPool[23]DWithIndices", edge.kind):
        return False
    stride = node._saved_stride or node._saved_kernel_size
    options = zip(node._saved_kernel_size, stride, node._saved_dilation, strict=True)
    return all(d * (k - 1) < s for k, s, d in options)
