"""Per-sample parameter gradients of the layer classes of torch and transformers.

A rule maps a recorded call and δ [B, S, ...], the cotangents of S draws at the call's output, to the
per-sample gradients g [B, S, *parameter.shape]. Only layers of exactly a listed class have rules: a
subclass may compute anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fimprobe.engines.layers.convolutions import conv_weight
from fimprobe.engines.layers.layer_call import LayerCall
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
    x, delta = _positions(x.unsqueeze(1)), _positions(delta)
    return torch.matmul(delta.transpose(2, 3), x)


def _positions(x: Tensor) -> Tensor:
    """Reshape [B, S, ..., width] to [B, S, T, width]."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, x.shape[-1])


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


def channel_sum(call: LayerCall, product: Tensor) -> Tensor:
    """Sum over all dimensions except those of the samples, the draws and the channels.

    Args:
        call: The call; of a folded one, ``product`` has the k parts of each sample.
        product: A product with δ, or δ itself: [B, S, C, ...], folded [B, S, k, C, ...].

    Returns:
        The sums [B, S, C].
    """
    axis = 3 if call.folded else 2
    others = [d for d in range(2, product.dim()) if d != axis]
    return product.sum(others) if others else product


def _normalised(call: LayerCall, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a normalisation to the input as the module saw it: [B, 1, (k,) C, ...]."""
    (x,) = call.inputs
    if call.folded:
        return normalise(x.flatten(0, 1)).unflatten(0, x.shape[:2]).unsqueeze(1)
    return normalise(x).unsqueeze(1)


def _trailing(call: LayerCall, product: Tensor) -> Tensor:
    """Sum [B, S, ..., *normalized_shape] over the dimensions in the middle."""
    keep = len(call.module.normalized_shape)  # type: ignore[arg-type]
    middle = list(range(2, product.dim() - keep))
    return product.sum(middle) if middle else product


def layer_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of a LayerNorm: g = Σ_t δ_t x̂_t, with the normalised input x̂.

    Args:
        call: The call, with the input [B, ..., *normalized_shape].
        delta: Cotangents [B, S, ..., *normalized_shape].

    Returns:
        g [B, S, *normalized_shape].
    """
    m: Any = call.module
    x = call.inputs[0].unsqueeze(1)
    return _trailing(call, delta * F.layer_norm(x, m.normalized_shape, eps=m.eps))


def layer_norm_bias(call: LayerCall, delta: Tensor) -> Tensor:
    """Bias gradients of a LayerNorm: g = Σ_t δ_t.

    Args:
        call: The call; only the layer's ``normalized_shape`` is read.
        delta: Cotangents [B, S, ..., *normalized_shape].

    Returns:
        g [B, S, *normalized_shape].
    """
    return _trailing(call, delta)


def rms_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of an RMSNorm: g = Σ_t δ_t x_t / rms(x_t).

    Args:
        call: The call, with the input x [B, ..., *normalized_shape].
        delta: Cotangents [B, S, ..., *normalized_shape].

    Returns:
        g [B, S, *normalized_shape].
    """
    m: Any = call.module
    x = call.inputs[0].unsqueeze(1)
    return _trailing(call, delta * F.rms_norm(x, m.normalized_shape, eps=m.eps))


def group_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of a GroupNorm: g_c = Σ_t δ_tc x̂_tc, with the normalised input x̂.

    Args:
        call: The call, with the input [B, C, ...], folded [B, k, C, ...].
        delta: Cotangents [B, S, C, ...], folded [B, S, k, C, ...].

    Returns:
        g [B, S, C].
    """
    m: Any = call.module
    xhat = _normalised(call, lambda x: F.group_norm(x, m.num_groups, eps=m.eps))
    return channel_sum(call, delta * xhat)


def running_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of BatchNorm and InstanceNorm: g_c = Σ_t δ_tc x̂_tc.

    The input x̂ is normalised by running statistics, as in eval mode. An InstanceNorm without them
    uses those of each sample.

    Args:
        call: The call, with the input [B, C, ...], folded [B, k, C, ...].
        delta: Cotangents [B, S, C, ...], folded [B, S, k, C, ...].

    Returns:
        g [B, S, C].
    """
    m: Any = call.module

    def normalise(x: Tensor) -> Tensor:
        if m.running_mean is None:  # InstanceNorm
            return F.instance_norm(x, eps=m.eps)
        return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)

    return channel_sum(call, delta * _normalised(call, normalise))


def prelu_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of a PReLU: g_c = Σ_t δ_tc min(x_tc, 0).

    Args:
        call: The call, with the input [B, C, ...], folded [B, k, C, ...].
        delta: Cotangents of the input's shape, with the S draws after the samples.

    Returns:
        g [B, S, C], or [B, S, 1] if one weight serves all channels.
    """
    product = delta * call.inputs[0].unsqueeze(1).clamp(max=0)
    if call.module.weight.numel() == 1:  # type: ignore[union-attr,operator]
        return product.flatten(2).sum(2, keepdim=True)
    return channel_sum(call, product)


def embedding_tokens(call: LayerCall, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zero rows of a lookup's gradient, one for each (sample, token) pair that occurs.

    Args:
        call: A call of an Embedding or EmbeddingBag.
        delta: Cotangents [B, S, ..., D].

    Returns:
        Sample [U], token [U] and gradient of the token's row [U, S, D] of each pair.
    """
    module: Any = call.module
    tokens = call.inputs[0].reshape(call.inputs[0].shape[0], -1)
    samples, length = tokens.shape
    if isinstance(module, nn.EmbeddingBag):  # δ [B, S, D] goes to every token of the bag
        share = call.inputs[1] if len(call.inputs) > 1 else torch.ones_like(tokens, dtype=delta.dtype)
        if module.padding_idx is not None:
            share = share * (tokens != module.padding_idx)
        if module.mode == "mean":
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        delta = delta.unsqueeze(2) * share.to(delta.dtype)[:, None, :, None]
    delta = delta.reshape(samples, delta.shape[1], length, -1)
    if module.padding_idx is not None:
        delta = delta * (tokens != module.padding_idx)[:, None, :, None]
    # one integer for each pair, so that one sort finds those that occur
    key = tokens + torch.arange(samples, device=tokens.device)[:, None] * module.num_embeddings
    pairs, inverse = key.flatten().unique(return_inverse=True)
    rows = delta.new_zeros(len(pairs), delta.shape[1], delta.shape[3])
    rows.index_add_(0, inverse, delta.transpose(1, 2).flatten(0, 1))
    return pairs // module.num_embeddings, pairs % module.num_embeddings, rows


def embedding_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """The gradient of a lookup as a dense tensor, for weights that are also used elsewhere.

    Args:
        call: A call of an Embedding or EmbeddingBag with V rows of width D.
        delta: Cotangents [B, S, ..., D].

    Returns:
        g [B, S, V, D].
    """
    module: Any = call.module
    sample, token, rows = embedding_tokens(call, delta)
    shape = (delta.shape[0], delta.shape[1], *module.weight.shape)
    dense = delta.new_zeros(shape)
    dense[sample, :, token] = rows
    return dense


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
