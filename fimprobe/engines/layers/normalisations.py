"""Per-sample gradients of layers that scale channels: normalisations and PReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fimprobe.engines.layers.layer_call import LayerCall


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
