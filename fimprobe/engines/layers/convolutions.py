"""Per-sample weight gradients of convolutions and transposed convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fimprobe.engines.layers.layer_call import LayerCall

MAX_PATCH_TAPS = 48
"""Convolutions with at most so many taps (input channels × kernel) multiply patches."""

MIN_PATCH_ROWS = 96
"""On a CPU, convolutions do so too from so many rows of δ (draws × output channels), if S > 1.

Patches are formed once for all draws. With one draw the library's kernel is as fast.
"""

MAX_PATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Maximum size of the patches formed at once, of one sample at least; it is that of caches."""


def conv_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of every sample, from products with patches or from a grouped convolution.

    All samples become groups of one convolution, whose weight gradient holds every g_b. The
    library's own kernel does the work, with neither patches nor one call for each sample. For few
    taps, and on a CPU for many draws, products with patches are faster.

    Args:
        call: A call of a Conv or ConvTranspose layer.
        delta: Cotangents [B, S, O, ...], folded [B, S, k, O, ...].

    Returns:
        g [B, S, *weight.shape].
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
    if module.transposed:
        # forward(output_size=...) overrides the module's own output_padding: recompute it
        output_padding = [
            out_size - ((size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for out_size, size, stride, pad, dilation, kernel in zip(
                delta.shape[4:],
                x.shape[3:],
                module.stride,
                padding,
                module.dilation,
                module.kernel_size,
                strict=True,
            )
        ]
    else:
        output_padding = list(module.output_padding)
    draws_share_a_call = not module.transposed and module.groups == 1
    if draws_share_a_call and folds == 1 and _prefers_patches(module, delta):
        return _from_patches(module, x.squeeze(1), delta.squeeze(2), padding)
    each = [delta] if draws_share_a_call else delta.split(1, dim=1)
    gradients = [_from_grouped_convolution(module, x, d, padding, output_padding) for d in each]
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)


def _prefers_patches(module: Any, delta: Tensor) -> bool:
    """Whether products with patches are the faster way, for δ [B, S, 1, O, ...]."""
    if math.prod(module.weight.shape[1:]) <= MAX_PATCH_TAPS:
        return True
    draws, channels = delta.shape[1], delta.shape[3]
    return delta.device.type == "cpu" and draws > 1 and draws * channels >= MIN_PATCH_ROWS


def _from_patches(module: Any, x: Tensor, delta: Tensor, padding: Any) -> Tensor:
    """Products of δ [B, S·O, L] with patches [B, L, C·K], for layers with few taps.

    Args:
        module: The convolution.
        x: Its inputs [B, C, ...].
        delta: Cotangents [B, S, O, ...].
        padding: Zero padding that is not applied yet.

    Returns:
        g [B, S, *weight.shape].
    """
    width = [side for pad in reversed(padding) for side in (pad, pad)]
    x = F.pad(x, width) if any(width) else x.contiguous()
    samples, draws = delta.shape[:2]
    rows = delta.reshape(samples, -1, math.prod(delta.shape[3:]))
    taps = math.prod(module.weight.shape[1:])
    bytes_each = taps * rows.shape[2] * x.element_size()
    most_bytes = MAX_PATCH_BYTES.get(x.device.type, MAX_PATCH_BYTES["cuda"])
    step = max(1, most_bytes // max(bytes_each, 1))
    products = [
        torch.bmm(d, _patches(module, block, delta.shape[3:]).transpose(1, 2))
        for block, d in zip(x.split(step), rows.split(step), strict=True)
    ]
    product = products[0] if len(products) == 1 else torch.cat(products)
    return product.view(samples, draws, *module.weight.shape)


def _patches(module: Any, x: Tensor, sizes: torch.Size) -> Tensor:
    """The inputs of each output position [b, C·K, L], from padded inputs x [b, C, ...].

    Args:
        module: The convolution.
        x: Its inputs, padded.
        sizes: The L positions by dimension.
    """
    steps = x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *module.kernel_size, *sizes),
        (
            *x.stride()[:2],
            *(step * d for step, d in zip(steps, module.dilation, strict=True)),
            *(step * s for step, s in zip(steps, module.stride, strict=True)),
        ),
    )
    return view.reshape(len(x), -1, math.prod(sizes))


def _from_grouped_convolution(
    module: Any, x: Tensor, delta: Tensor, padding: Any, output_padding: list[int]
) -> Tensor:
    """Weight gradients [B, S, *weight.shape]: the samples are groups of one convolution.

    With S > 1, the draws are further output channels of a convolution that is neither transposed
    nor grouped itself.

    Args:
        module: The convolution.
        x: Its inputs [B, k, C, ...].
        delta: Cotangents [B, S, k, O, ...].
        padding: Zero padding that is not applied yet.
        output_padding: For transposed convolutions.
    """
    samples, folds = x.shape[:2]
    draws, shape = delta.shape[1], module.weight.shape
    # by way of one dimension: dimensions of length 1 may have strides that torch's kernel refuses
    channels = x.transpose(0, 1).reshape(-1).view(folds, samples * x.shape[2], *x.shape[3:])
    cotangents = delta.movedim(2, 0).reshape(-1)
    cotangents = cotangents.view(folds, samples * draws * delta.shape[3], *delta.shape[4:])
    gradient = torch.ops.aten.convolution_backward(
        cotangents,
        channels,
        x.new_empty((samples * draws * shape[0], *shape[1:])),
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        output_padding,
        samples * module.groups,
        [False, True, False],
    )[1]
    return gradient.view(samples, draws, *shape)
