"""Per-sample parameter gradients of the layers torch and transformers are made of.

A rule takes a recorded call and δ [B, S, ...], the gradients of S draws at the call's output, and
gives g [B, S, *parameter.shape]. A layer of exactly a listed class uses its rules; a subclass may
compute anything and does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class LayerCall:
    """One call of a module: its inputs with the batch first, detached.

    ``folded``: the module saw [B·k, ...]; inputs and δ are unfolded to [B, k, ...].
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    folded: bool = False

    def rows(self, samples: slice) -> LayerCall:
        """The call on some samples only."""
        return LayerCall(self.module, tuple(x[samples] for x in self.inputs), self.folded)


FEW_TAPS = 48
"""Convolutions of no more taps (input channels × kernel) multiply patches; measured on a CPU."""

Gradient = Callable[[LayerCall, Tensor], Tensor]


@dataclass(frozen=True)
class GradientRule:
    """How one parameter of a layer gets its per-sample gradient.

    ``tiles``: slicing δ's last dimension slices the parameter's first. ``outer``: without shared
    positions the gradient is an outer product δ xᵀ, whose moments factor.
    See docs/theory.md, "Sums without per-sample gradients".
    ``tokens``: the gradient has rows for the tokens of the sample only. ``shift``: the parameter is
    added to the output along its "last" dimensions or its "channel" dimension. ``linear``: the
    gradient is linear in the layer's input, as it is in δ. ``vector``: it is no larger than one
    position of δ, and can be held for all samples.
    """

    gradient: Gradient
    tiles: bool = False
    outer: bool = False
    tokens: bool = False
    shift: Literal["last", "channel"] | None = None
    linear: bool = False
    vector: bool = False


def linear_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """G_oi = Σ_t δ_to x_ti."""
    (x,) = call.inputs
    if x.dim() == 2:
        return delta.unsqueeze(-1) * x[:, None, None, :]
    x, delta = _positions(x.unsqueeze(1)), _positions(delta)
    return torch.matmul(delta.transpose(2, 3), x)


def _positions(x: Tensor) -> Tensor:
    """[B, S, ..., width] as [B, S, T, width]."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, x.shape[-1])


def last_bias(call: LayerCall, delta: Tensor) -> Tensor:
    """G_o = Σ_t δ_to."""
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1]).sum(2)


def conv1d_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """transformers' Conv1D keeps its weight as [in, out]: G_io = Σ_t x_ti δ_to."""
    (x,) = call.inputs
    if x.dim() == 2:
        return x[:, None, :, None] * delta.unsqueeze(-2)
    x, delta = _positions(x.unsqueeze(1)), _positions(delta)
    return torch.matmul(x.transpose(2, 3), delta)


def bilinear_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """G_oij = Σ_t δ_to x_ti x'_tj."""
    x, other = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in call.inputs)
    delta = delta.reshape(*delta.shape[:2], -1, delta.shape[-1])
    return torch.einsum("bnto,bti,btj->bnoij", delta, x, other)


def conv_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """All samples as the groups of one convolution: its weight gradient holds every g_b.

    Neither patches nor per-sample calls: the library's own weight-gradient kernel does the work.
    """
    module: Any = call.module
    (x,) = call.inputs
    if not call.folded:
        x, delta = x.unsqueeze(1), delta.unsqueeze(2)
    samples, folds = x.shape[:2]
    padding = module.padding
    if not module.transposed and (isinstance(padding, str) or module.padding_mode != "zeros"):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x.flatten(0, 1), module._reversed_padding_repeated_twice, mode=mode)
        x = x.unflatten(0, (samples, folds))
        padding = (0,) * len(module.kernel_size)
    taps = math.prod(module.weight.shape[1:])
    if not module.transposed and module.groups == 1 and folds == 1 and taps <= FEW_TAPS:
        return _from_patches(module, x.squeeze(1), delta.squeeze(2), padding)
    output_padding = list(module.output_padding)
    if module.transposed:  # forward(output_size=...) may ask for another one than the module's
        output_padding = [
            have - ((size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for have, size, stride, pad, dilation, kernel in zip(
                delta.shape[4:],
                x.shape[3:],
                module.stride,
                padding,
                module.dilation,
                module.kernel_size,
                strict=True,
            )
        ]
    gradients = [_grouped(module, x, draw, padding, output_padding) for draw in delta.unbind(1)]
    return gradients[0].unsqueeze(1) if len(gradients) == 1 else torch.stack(gradients, 1)


def _from_patches(module: Any, x: Tensor, delta: Tensor, padding: Any) -> Tensor:
    """G = δ [B, S·O, L] times patches [B, L, C·K]: the better way for few input channels."""
    width = [side for pad in reversed(padding) for side in (pad, pad)]
    x = F.pad(x, width) if any(width) else x.contiguous()
    samples, channels = x.shape[:2]
    steps, sizes = x.stride()[2:], delta.shape[3:]
    patches = x.as_strided(
        (samples, channels, *module.kernel_size, *sizes),
        (
            *x.stride()[:2],
            *(step * d for step, d in zip(steps, module.dilation, strict=True)),
            *(step * s for step, s in zip(steps, module.stride, strict=True)),
        ),
    ).reshape(samples, -1, math.prod(sizes))
    seed = delta.reshape(samples, -1, patches.shape[2])
    product = torch.bmm(seed, patches.transpose(1, 2))
    return product.view(samples, delta.shape[1], *module.weight.shape)


def _grouped(
    module: Any, x: Tensor, delta: Tensor, padding: Any, output_padding: list[int]
) -> Tensor:
    """Weight gradients [B, *weight.shape] for x [B, k, C, ...] and one draw's δ [B, k, O, ...]."""
    samples, folds = x.shape[:2]
    shape = module.weight.shape
    grouped = x.transpose(0, 1).reshape(folds, samples * x.shape[2], *x.shape[3:])
    seed = delta.transpose(0, 1).reshape(folds, samples * delta.shape[2], *delta.shape[3:])
    gradient = torch.ops.aten.convolution_backward(
        seed,
        grouped,
        x.new_empty((samples * shape[0], *shape[1:])),
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        output_padding,
        samples * module.groups,
        [False, True, False],
    )[1]
    return gradient.view(samples, *shape)


def channel_sum(call: LayerCall, product: Tensor) -> Tensor:
    """[B, S, (k,) C, ...] summed over everything but B, S and C."""
    axis = 3 if call.folded else 2
    others = [d for d in range(2, product.dim()) if d != axis]
    return product.sum(others) if others else product


def _normalised(call: LayerCall, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    (x,) = call.inputs
    if call.folded:
        return normalise(x.flatten(0, 1)).unflatten(0, x.shape[:2]).unsqueeze(1)
    return normalise(x).unsqueeze(1)


def _trailing(call: LayerCall, product: Tensor) -> Tensor:
    """[B, S, ..., *normalized_shape] summed over the dimensions between."""
    keep = len(call.module.normalized_shape)  # type: ignore[arg-type]
    between = list(range(2, product.dim() - keep))
    return product.sum(between) if between else product


def layer_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """G = Σ_t δ_t x̂_t."""
    m: Any = call.module
    x = call.inputs[0].unsqueeze(1)
    return _trailing(call, delta * F.layer_norm(x, m.normalized_shape, eps=m.eps))


def layer_norm_bias(call: LayerCall, delta: Tensor) -> Tensor:
    """G = Σ_t δ_t."""
    return _trailing(call, delta)


def rms_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """G = Σ_t δ_t x_t / rms(x_t)."""
    m: Any = call.module
    x = call.inputs[0].unsqueeze(1)
    return _trailing(call, delta * F.rms_norm(x, m.normalized_shape, eps=m.eps))


def group_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """G_c = Σ δ_c x̂_c."""
    m: Any = call.module
    xhat = _normalised(call, lambda x: F.group_norm(x, m.num_groups, eps=m.eps))
    return channel_sum(call, delta * xhat)


def running_norm_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """BatchNorm in eval mode, InstanceNorm with either statistics: G_c = Σ δ_c x̂_c."""
    m: Any = call.module

    def normalise(x: Tensor) -> Tensor:
        if m.running_mean is None:  # InstanceNorm
            return F.instance_norm(x, eps=m.eps)
        return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)

    return channel_sum(call, delta * _normalised(call, normalise))


def prelu_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """G_c = Σ δ_c min(x_c, 0)."""
    product = delta * call.inputs[0].unsqueeze(1).clamp(max=0)
    if call.module.weight.numel() == 1:  # type: ignore[union-attr,operator]
        return product.flatten(2).sum(2, keepdim=True)
    return channel_sum(call, product)


def embedding_tokens(call: LayerCall, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a lookup: sample [U], token [U] and g [U, S, D], one row per pair that occurs."""
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
    key = tokens + torch.arange(samples, device=tokens.device)[:, None] * module.num_embeddings
    pairs, inverse = key.flatten().unique(return_inverse=True)
    rows = delta.new_zeros(len(pairs), delta.shape[1], delta.shape[3])
    rows.index_add_(0, inverse, delta.transpose(1, 2).flatten(0, 1))
    return pairs // module.num_embeddings, pairs % module.num_embeddings, rows


def embedding_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """The lookup's gradient as a dense [B, S, V, D]: for weights with further uses."""
    module: Any = call.module
    sample, token, rows = embedding_tokens(call, delta)
    shape = (delta.shape[0], delta.shape[1], *module.weight.shape)
    dense = delta.new_zeros(shape)
    dense[sample, :, token] = rows
    return dense


LINEAR = {
    "weight": GradientRule(linear_weight, tiles=True, outer=True, linear=True),
    "bias": GradientRule(last_bias, tiles=True, shift="last", vector=True),
}
_CHANNEL_BIAS = GradientRule(channel_sum, shift="channel", vector=True)
_CONV = {"weight": GradientRule(conv_weight, linear=True), "bias": _CHANNEL_BIAS}
_RUNNING = {"weight": GradientRule(running_norm_weight, vector=True), "bias": _CHANNEL_BIAS}
_LOOKUP = {"weight": GradientRule(embedding_weight, tokens=True)}
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
    nn.Bilinear: {"weight": GradientRule(bilinear_weight, tiles=True), "bias": LINEAR["bias"]},
    **dict.fromkeys(_CONVS, _CONV),
    **dict.fromkeys(_RUNNING_NORMS, _RUNNING),
    nn.LayerNorm: {
        "weight": GradientRule(layer_norm_weight, vector=True),
        "bias": GradientRule(layer_norm_bias, shift="last", vector=True),
    },
    nn.RMSNorm: {"weight": GradientRule(rms_norm_weight, vector=True)},
    nn.GroupNorm: {"weight": GradientRule(group_norm_weight, vector=True), "bias": _CHANNEL_BIAS},
    nn.PReLU: {"weight": GradientRule(prelu_weight, vector=True)},
    nn.Embedding: _LOOKUP,
    nn.EmbeddingBag: _LOOKUP,
}
_BY_NAME = {
    "transformers.pytorch_utils.Conv1D": {
        "weight": GradientRule(conv1d_weight, outer=True, linear=True),
        "bias": LINEAR["bias"],
    }
}


def direction(
    rule: GradientRule,
    module: nn.Module,
    name: str,
    args: tuple[Any, ...],
    out: torch.Size,
    along: Tensor,
) -> Tensor:
    """The output's derivative along ``along``, a direction of the parameter it is affine in.

    ``args`` are the module's own inputs, ``out`` its output's shape; autograd goes through them.
    """
    if rule.shift == "last":
        return along.expand(out)
    if rule.shift == "channel":
        return along.view(-1, *[1] * (len(out) - 2)).expand(out)
    if getattr(module, "padding_idx", None) is not None:
        along = along.index_fill(0, torch.tensor([module.padding_idx], device=along.device), 0)
    others = {n: torch.zeros_like(p) for n, p in module._parameters.items() if p is not None}
    options = {"output_size": list(out[2:])} if getattr(module, "transposed", False) else {}
    result: Tensor = functional_call(module, others | {name: along}, args, options)
    if isinstance(module, nn.PReLU):  # its output does not vanish with its weight
        result = result - functional_call(module, others, args)
    return result


def rules_for(module: nn.Module) -> dict[str, GradientRule]:
    """The rules of a layer by parameter name; empty where the layer is not one we know."""
    kind = type(module)
    if kind in RULES:
        if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
            return {}
        if isinstance(module, _RUNNING_NORMS) and "InstanceNorm" not in kind.__name__:
            return RULES[kind] if module.running_mean is not None else {}
        return RULES[kind]
    return _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}", {})
