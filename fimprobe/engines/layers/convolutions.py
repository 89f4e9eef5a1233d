"""Per-sample weight gradients of convolutions and transposed convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fimprobe.engines.layers.layer_call import LayerCall

MAX_PATCH_TAPS = 48
"""Convolutions with at most so many taps (input channels × kernel) multiply patches.

Measured on a CPU: with more taps a grouped convolution is faster.
"""


def conv_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """Weight gradients of every sample, from one grouped convolution per draw.

    All samples become groups of one convolution, whose weight gradient holds every g_b. The
    library's own kernel does the work, with neither patches nor one call for each sample. For few
    taps, products with patches are faster.

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
    taps = math.prod(module.weight.shape[1:])
    if not module.transposed and module.groups == 1 and folds == 1 and taps <= MAX_PATCH_TAPS:
        return _from_patches(module, x.squeeze(1), delta.squeeze(2), padding)
    output_padding = list(module.output_padding)
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
    gradients = [
        _from_grouped_convolution(module, x, draw, padding, output_padding)
        for draw in delta.unbind(1)
    ]
    return gradients[0].unsqueeze(1) if len(gradients) == 1 else torch.stack(gradients, 1)


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
    rows = delta.reshape(samples, -1, patches.shape[2])
    product = torch.bmm(rows, patches.transpose(1, 2))
    return product.view(samples, delta.shape[1], *module.weight.shape)


def _from_grouped_convolution(
    module: Any, x: Tensor, delta: Tensor, padding: Any, output_padding: list[int]
) -> Tensor:
    """Weight gradients [B, *weight.shape] of one draw: the samples are groups of one convolution.

    Args:
        module: The convolution.
        x: Its inputs [B, k, C, ...].
        delta: Cotangents of the draw [B, k, O, ...].
        padding: Zero padding that is not applied yet.
        output_padding: For transposed convolutions.
    """
    samples, folds = x.shape[:2]
    shape = module.weight.shape
    channels = x.transpose(0, 1).reshape(folds, samples * x.shape[2], *x.shape[3:])
    cotangents = delta.transpose(0, 1).reshape(folds, samples * delta.shape[2], *delta.shape[3:])
    gradient = torch.ops.aten.convolution_backward(
        cotangents,
        channels,
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
