"""Norms of what a layer's weight meets: its input rows, or a convolution's patches of the images."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.jacobian_bounds.conv_geometry import ConvGeometry, weighted
from fimprobe.jacobian_bounds.spectral_norm import ROUNDING, accurate, gram_bound

DENSE_SIDE, POWER_SIDE, GRAM_SIDE = 16, 128, 512
SQUARINGS = 3
PATCH_PRODUCTS = 2**19
"""Multiplications for one input's Gram matrix of patches, up to which it is formed."""
CHUNK_NUMBERS = 2**22


class InputNorms(NamedTuple):
    """Of each input's X̃, whose rows meet the weights: z = X̃ Wᵀ, hence ∂z/∂W = X̃ ⊗ I.

    ``spectral`` [B] bounds s_max(X̃), ``frobenius`` [B] is ‖X̃‖_F; with g groups of o/g outputs X̃
    is block diagonal and ‖∂z/∂W‖_F² = Σ_g (o/g) ‖X̃_g‖_F² = (o/g) ``frobenius``².
    """

    spectral: Tensor
    frobenius: Tensor


def linear_input_norms(rows: Tensor, *, weight: bool, bias: bool) -> InputNorms:
    """Norms of X̃ for the rows [B, T, d] that a Linear layer was given, with a column of ones for
    the bias; without either part where it is not trained.
    """
    if not weight:
        return bias_norms(rows.shape[0], rows.shape[1])
    length = rows.shape[1]
    whole = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float64)
    whole = torch.hypot(whole, whole.new_tensor(math.sqrt(length * bias))).cpu() * ROUNDING
    if length == 1:
        return InputNorms(whole, whole)
    found = []
    for part in _chunks(rows, rows[0].numel()):
        x, scale = _scaled(part, bias)
        if bias:
            ones = (1 / scale).to(x.dtype).view(-1, 1, 1).expand(-1, length, 1)
            x = torch.cat([x, ones], 2)
        found.append((_largest(x).sqrt() * scale).cpu() * ROUNDING)
    return InputNorms(torch.minimum(torch.cat(found), whole), whole)


def convolution_input_norms(
    images: Tensor, window: ConvGeometry, *, groups: int, bias: bool
) -> InputNorms:
    """Norms of the patch matrices X̃ of ``images`` [B, I, C, ...], I of them belonging to one input.

    s_max is that of the patches where their Gram matrix takes at most 2¹⁹ multiplications. Else the
    least of ‖X̃‖_F and √(Σ_τ s_max(X_φ(τ))² + number of ones): the columns of tap τ are pixels of
    the images, each at most once, and all from the same one X_φ [pixels, C] of the s^dims images
    that the stride interleaves. s_max of a Gram matrix: see :func:`_largest`.
    """
    count, channels = images.shape[1:3]
    images = images.unflatten(2, (groups, channels // groups))
    length = count * math.prod(window.out_size)
    width = channels // groups * math.prod(window.kernel) + bias
    formed = groups * length * width * min(length, width) <= PATCH_PRODUCTS
    numbers = max(images[0].numel(), formed * length * width * groups)
    spectral, frobenius = [], []
    for part in _chunks(images, numbers):
        x, scale = _scaled(part, bias)
        counted = weighted(x.square().sum(3, dtype=torch.float64), window.counts()[1])
        squares = counted.flatten(3).sum((1, 3)) + length * bias / scale[:, None].square()
        squares *= 1 + 4 * torch.finfo(x.dtype).eps
        if formed:
            largest = _largest(_patches(x, scale, window, bias))
        else:
            largest = _pixel_bound(x, window) + length * bias / scale[:, None].square()
        spectral.append((torch.minimum(largest, squares).amax(1).sqrt() * scale).cpu())
        frobenius.append((squares.sum(1).sqrt() * scale).cpu())
    return InputNorms(torch.cat(spectral) * ROUNDING, torch.cat(frobenius) * ROUNDING)


def bias_norms(samples: int, positions: int, groups: int = 1) -> InputNorms:
    """X̃ = 1, a column: where only the bias is trained."""
    norm = torch.full((samples,), math.sqrt(positions), dtype=torch.float64)
    return InputNorms(norm, norm * math.sqrt(groups))


def _patches(x: Tensor, scale: Tensor, window: ConvGeometry, bias: bool) -> Tensor:
    """X̃ᵀ [B, groups, channels and taps and bias, positions] of images [B, I, groups, channels, ...].

    The positions come last: rows of pixels are copied fast.
    """
    x = torch.nn.functional.pad(x, [p for p in reversed(window.padding) for _ in range(2)])
    dims = len(window.kernel)
    for dim, r, s in zip(range(4, 4 + dims), window.reach, window.stride, strict=True):
        x = x.unfold(dim, r, s)
    for dim, d in zip(range(-dims, 0), window.dilation, strict=True):
        x = x.movedim(dim, -1)[..., ::d].movedim(-1, dim)
    samples, count, groups, channels = x.shape[:4]
    x = x.permute(0, 2, 3, *range(4 + dims, 4 + 2 * dims), 1, *range(4, 4 + dims))
    width = channels * math.prod(window.kernel)
    found = x.new_empty(samples, groups, width + bias, count * math.prod(window.out_size))
    found[:, :, :width].view(x.shape).copy_(x)
    if bias:
        found[:, :, width] = (1 / scale).view(-1, 1, 1)
    return found


def _pixel_bound(x: Tensor, window: ConvGeometry) -> Tensor:
    """Σ_τ s_max(X_φ(τ))² [B, groups] for images [B, I, groups, channels, ...]."""
    phases = [
        Counter((d * tap - p) % s for tap in range(k))
        for k, s, p, d in zip(
            window.kernel, window.stride, window.padding, window.dilation, strict=True
        )
    ]
    found = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float64)
    for phase in itertools.product(*(p.items() for p in phases)):
        pixels = x
        for dim, ((start, _), s) in enumerate(zip(phase, window.stride, strict=True), start=4):
            pixels = pixels.movedim(dim, 0)[start::s].movedim(0, dim)
        pixels = pixels.flatten(4).permute(0, 2, 3, 1, 4).flatten(3)
        found += math.prod(times for _, times in phase) * _largest(pixels)
    return found


def _largest(x: Tensor) -> Tensor:
    """At least s_max² of each X [..., m, n]: λ_max of the smaller Gram matrix G.

    Up to rounding exact up to 16 rows or columns; ‖G⁸‖_F^(1/8) up to 128, at most 36 % above and
    near it where the rows have much in common; ‖G‖_F up to 512; beyond ‖X‖_F².
    """
    side = min(x.shape[-2:])
    if side == 0 or side > GRAM_SIDE:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64)
        return norm.square() * ROUNDING
    if side <= DENSE_SIDE:
        return gram_bound(x)
    return gram_bound(x, SQUARINGS if side <= POWER_SIDE else 0)


def _scaled(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Each of [B, ...] over its largest absolute value, or at least the bias' one; and that [B]."""
    x = accurate(x)
    scale = x.abs().flatten(1).amax(1) if x[0].numel() else x.new_zeros(x.shape[0])
    scale = scale.clamp(min=1) if bias else torch.where(scale > 0, scale, 1)
    return x / scale.view(-1, *[1] * (x.dim() - 1)), scale.double()


def _chunks(x: Tensor, numbers_per_sample: int) -> Sequence[Tensor]:
    return x.split(max(1, CHUNK_NUMBERS // max(1, numbers_per_sample)))
