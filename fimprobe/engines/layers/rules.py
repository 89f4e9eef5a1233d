"""Rules: which function computes the per-sample gradient of each parameter of a layer class.

A rule maps a recorded call and δ [B, S, ...], the cotangents of S draws at the call's output, to the
per-sample gradients g [B, S, *parameter.shape]. Only layers of exactly a listed class have rules: a
subclass may compute anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fimprobe.engines.layers.convolutions import conv_weight
from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.lookups import embedding_weight
from fimprobe.engines.layers.normalisations import (
    channel_sum,
    group_norm_weight,
    layer_norm_bias,
    layer_norm_weight,
    prelu_weight,
    rms_norm_weight,
    running_norm_weight,
)
from fimprobe.model.twin import has_altered_call

Gradient = Callable[[LayerCall, Tensor], Tensor]
"""Maps a call and δ [B, S, ...] to g [B, S, *parameter.shape]."""


@dataclass(frozen=True, kw_only=True)
class GradientRule:
    """How the per-sample gradient of one parameter of a layer is computed.

    Attributes:
        gradient: The function that computes it.
        row_separable: Slicing the last dimension of δ slices the first one of the parameter.
        outer: With one position for each sample the gradient is an outer product δ xᵀ, whose moments
            factor. See docs/theory.md, "Sums without per-sample gradients".
        lookup: The gradient has non-zero rows for the tokens of the sample only.
        additive: The parameter is added to the output, along its "last" dimensions or along its
            "channel" dimension.
        linear: The gradient is linear in the layer's input, as it is in δ.
        vector: The parameter is no larger than one position of δ, so that the gradients of all
            samples fit into memory.
    """

    gradient: Gradient
    row_separable: bool = False
    outer: bool = False
    lookup: bool = False
    additive: Literal["last", "channel"] | None = None
    linear: bool = False
    vector: bool = False


def linear_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of a Linear layer: g_oi = Σ_t δ_to x_ti.

    Args:
        call: The call, with the input x [B, ..., i].
        delta: Cotangents [B, S, ..., o].

    Returns:
        g [B, S, o, i].
    """
    (x,) = call.inputs
    if x.dim() == 2:
        return delta.unsqueeze(-1) * x[:, None, None, :]
    if delta.shape[1] == 1:  # without broadcasting, which takes more operations
        x, delta = _flat_positions(x), _flat_positions(delta.squeeze(1))
        return torch.bmm(delta.transpose(1, 2), x).unsqueeze(1)
    x, delta = _positions(x.unsqueeze(1)), _positions(delta)
    return torch.matmul(delta.transpose(2, 3), x)


def _positions(x: Tensor) -> Tensor:
    """Reshape [B, S, ..., width] to [B, S, T, width]."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, x.shape[-1])


def _flat_positions(x: Tensor) -> Tensor:
    """Reshape [B, ..., width] to [B, T, width]."""
    return x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])


def last_bias(call: LayerCall, delta: Tensor) -> Tensor:
    """Bias gradients along the last dimension: g_o = Σ_t δ_to.

    Args:
        call: The call, which is not read.
        delta: Cotangents [B, S, ..., o].

    Returns:
        g [B, S, o].
    """
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1]).sum(2)


def conv1d_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of the Conv1D of transformers: g_io = Σ_t x_ti δ_to.

    That layer is linear, and it keeps its weight as [in, out].

    Args:
        call: The call, with the input x [B, ..., i].
        delta: Cotangents [B, S, ..., o].

    Returns:
        g [B, S, i, o].
    """
    (x,) = call.inputs
    if x.dim() == 2:
        return x[:, None, :, None] * delta.unsqueeze(-2)
    if delta.shape[1] == 1:  # without broadcasting, which takes more operations
        x, delta = _flat_positions(x), _flat_positions(delta.squeeze(1))
        return torch.bmm(x.transpose(1, 2), delta).unsqueeze(1)
    x, delta = _positions(x.unsqueeze(1)), _positions(delta)
    return torch.matmul(x.transpose(2, 3), delta)


def bilinear_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of a Bilinear layer: g_oij = Σ_t δ_to x_ti x'_tj.

    Args:
        call: The call, with the inputs x [B, ..., i] and x' [B, ..., j].
        delta: Cotangents [B, S, ..., o].

    Returns:
        g [B, S, o, i, j].
    """
    x, other = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in call.inputs)
    delta = delta.reshape(*delta.shape[:2], -1, delta.shape[-1])
    return torch.einsum("bnto,bti,btj->bnoij", delta, x, other)


LINEAR = {
    "weight": GradientRule(gradient=linear_weight, row_separable=True, outer=True, linear=True),
    "bias": GradientRule(gradient=last_bias, row_separable=True, additive="last", vector=True),
}
"""Rules of a Linear layer."""

_CHANNEL_BIAS = GradientRule(gradient=channel_sum, additive="channel", vector=True)
_CONV = {"weight": GradientRule(gradient=conv_weight, linear=True), "bias": _CHANNEL_BIAS}
_RUNNING = {
    "weight": GradientRule(gradient=running_norm_weight, vector=True),
    "bias": _CHANNEL_BIAS,
}
_LOOKUP = {"weight": GradientRule(gradient=embedding_weight, lookup=True)}
_CONVS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_RUNNING_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
RULES: dict[type[nn.Module], dict[str, GradientRule]] = {
    nn.Linear: LINEAR,
    nn.modules.linear.NonDynamicallyQuantizableLinear: LINEAR,
    nn.Bilinear: {
        "weight": GradientRule(gradient=bilinear_weight, row_separable=True),
        "bias": LINEAR["bias"],
    },
    **dict.fromkeys(_CONVS, _CONV),
    **dict.fromkeys(_RUNNING_NORMS, _RUNNING),
    nn.LayerNorm: {
        "weight": GradientRule(gradient=layer_norm_weight, vector=True),
        "bias": GradientRule(gradient=layer_norm_bias, additive="last", vector=True),
    },
    nn.RMSNorm: {"weight": GradientRule(gradient=rms_norm_weight, vector=True)},
    nn.GroupNorm: {
        "weight": GradientRule(gradient=group_norm_weight, vector=True),
        "bias": _CHANNEL_BIAS,
    },
    nn.PReLU: {"weight": GradientRule(gradient=prelu_weight, vector=True)},
    nn.Embedding: _LOOKUP,
    nn.EmbeddingBag: _LOOKUP,
}
"""Rules of each layer class, by parameter name."""

_BY_CLASS_NAME = {
    "transformers.pytorch_utils.Conv1D": {
        "weight": GradientRule(gradient=conv1d_weight, outer=True, linear=True),
        "bias": LINEAR["bias"],
    }
}
"""Rules of classes that need not be installed."""


def parameter_jvp(
    rule: GradientRule,
    module: nn.Module,
    name: str,
    args: tuple[Any, ...],
    out: torch.Size,
    direction: Tensor,
) -> Tensor:
    """The derivative of a layer's output along a direction of one parameter.

    The output is affine in the parameter, so that the layer itself, called with the direction as its
    parameter, computes the derivative. Autograd sees the dependence on the inputs.

    Args:
        rule: The parameter's rule.
        module: The layer.
        name: The parameter's name in the layer.
        args: The inputs of the call, as the module saw them.
        out: Shape of the output.
        direction: The direction, of the parameter's shape.
    """
    if rule.additive == "last":
        return direction.expand(out)
    if rule.additive == "channel":
        return direction.view(-1, *[1] * (len(out) - 2)).expand(out)
    if getattr(module, "padding_idx", None) is not None:
        padding = torch.tensor([module.padding_idx], device=direction.device)
        direction = direction.index_fill(0, padding, 0)
    others = {n: torch.zeros_like(p) for n, p in module._parameters.items() if p is not None}
    options = {"output_size": list(out[2:])} if getattr(module, "transposed", False) else {}
    result: Tensor = functional_call(module, others | {name: direction}, args, options)
    if isinstance(module, nn.PReLU):  # its output does not vanish with its weight
        result = result - functional_call(module, others, args)
    return result


def rules_for(module: nn.Module) -> dict[str, GradientRule]:
    """The rules of a layer by parameter name; empty for a layer without rules."""
    if has_altered_call(module):
        return {}
    kind = type(module)
    if kind in RULES:
        if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
            return {}
        if isinstance(module, _RUNNING_NORMS) and "InstanceNorm" not in kind.__name__:
            # without running statistics BatchNorm couples the samples of a batch
            return RULES[kind] if module.running_mean is not None else {}
        return RULES[kind]
    return _BY_CLASS_NAME.get(f"{kind.__module__}.{kind.__qualname__}", {})
