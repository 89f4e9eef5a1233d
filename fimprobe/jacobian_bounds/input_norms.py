"""Norms of the rows that a weight multiplies: a layer's inputs, or the patches of a convolution.

Symbols: B samples, T positions of each, X̃ the rows with a column of ones for the bias.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.jacobian_bounds.conv_geometry import ConvGeometry, weighted
from fimprobe.jacobian_bounds.spectral_norm import ROUNDING, gram_bound, to_accurate_dtype

MAX_EXACT_SIDE, MAX_POWER_SIDE, MAX_GRAM_SIDE = 16, 128, 512
"""Sides of Gram matrices up to which :func:`_largest` uses eigenvalues, a power, their norm."""

SQUARINGS = 3
"""The power of a Gram matrix is the 2³ = 8th: at most 128^(1/16) = 1.36 times the largest value."""

MAX_PATCH_PRODUCTS = 2**19
"""Multiplications up to which the Gram matrix of one input's patches is formed."""

MAX_CHUNK_ELEMENTS = 2**22
"""Elements of patches that are formed at once: 16 MB in float32."""


class InputNorms(NamedTuple):
    """Norms of each input's X̃, where z = X̃ Wᵀ, hence ∂z/∂W = X̃ ⊗ I.

    With g groups of o/g outputs X̃ is block diagonal, and ‖∂z/∂W‖_F² = Σ_g (o/g) ‖X̃_g‖_F².

    Attributes:
        spectral: A bound of s_max(X̃), float64 [B].
        frobenius: ‖X̃‖_F, float64 [B].
    """

    spectral: Tensor
    frobenius: Tensor


def linear_input_norms(rows: Tensor, *, weight: bool, bias: bool) -> InputNorms:
    """Norms of X̃ of a Linear layer.

    Args:
        rows: Its inputs [B, T, d].
        weight: Whether its weight is trained; if not, X̃ is the column of ones.
        bias: Whether its bias is trained; if not, X̃ has no column of ones.
    """
    if not weight:
        return bias_norms(rows.shape[0], rows.shape[1])
    length = rows.shape[1]
    norm = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float64)
    norm = torch.hypot(norm, norm.new_tensor(math.sqrt(length * bias))).cpu() * ROUNDING
    if length == 1:
        return InputNorms(norm, norm)
    spectral = []
    for chunk in _chunks(rows, rows[0].numel()):
        x, scale = _scale_samples(chunk, bias)
        if bias:
            ones = (1 / scale).to(x.dtype).view(-1, 1, 1).expand(-1, length, 1)
            x = torch.cat([x, ones], 2)
        spectral.append((_largest(x).sqrt() * scale).cpu() * ROUNDING)
    return InputNorms(torch.minimum(torch.cat(spectral), norm), norm)


def convolution_input_norms(
    images: Tensor, geometry: ConvGeometry, *, groups: int, bias: bool
) -> InputNorms:
    """Norms of the patch matrices X̃ of a convolution.

    If the Gram matrix of the patches takes at most 2¹⁹ multiplications, s_max is bounded from it by
    :func:`_largest`. Else the bound is the lesser of ‖X̃‖_F and √(Σ_τ s_max(X_φ(τ))² + number of
    ones). The columns of tap τ are pixels of the images, each at most once. All of them come from
    the same X_φ [pixels, C] of the s^dims images that the stride interleaves.

    Args:
        images: Inputs [B, I, C, ...], I images belonging to one input of the model.
        geometry: The place of the kernel on them.
        groups: Groups of the convolution.
        bias: Whether its bias is trained.
    """
    count, channels = images.shape[1:3]
    images = images.unflatten(2, (groups, channels // groups))
    length = count * math.prod(geometry.out_size)
    width = channels // groups * math.prod(geometry.kernel) + bias
    formed = groups * length * width * min(length, width) <= MAX_PATCH_PRODUCTS
    numbers = max(images[0].numel(), formed * length * width * groups)
    spectral, frobenius = [], []
    for chunk in _chunks(images, numbers):
        x, scale = _scale_samples(chunk, bias)
        counted = weighted(x.square().sum(3, dtype=torch.float64), geometry.counts()[1])
        squares = counted.flatten(3).sum((1, 3)) + length * bias / scale[:, None].square()
        squares *= 1 + 4 * torch.finfo(x.dtype).eps
        if formed:
            largest = _largest(_patches(x, scale, geometry, bias))
        else:
            largest = _pixel_bound(x, geometry) + length * bias / scale[:, None].square()
        spectral.append((torch.minimum(largest, squares).amax(1).sqrt() * scale).cpu())
        frobenius.append((squares.sum(1).sqrt() * scale).cpu())
    return InputNorms(torch.cat(spectral) * ROUNDING, torch.cat(frobenius) * ROUNDING)


def bias_norms(samples: int, positions: int, groups: int = 1) -> InputNorms:
    """Norms of X̃ = 1, a column of ones: only the bias is trained.

    Args:
        samples: B.
        positions: Rows of X̃, the positions at which the bias is added.
        groups: Groups of a convolution, each with a column of its own.

    Returns:
        The norms, float64 [B]: s_max = √positions and ‖X̃‖_F = √(positions · groups).
    """
    norm = torch.full((samples,), math.sqrt(positions), dtype=torch.float64)
    return InputNorms(norm, norm * math.sqrt(groups))


def _patches(x: Tensor, scale: Tensor, geometry: ConvGeometry, bias: bool) -> Tensor:
    """X̃ᵀ [B, groups, channels and taps and bias, positions] of images [B, I, groups, channels, ...].

    The positions come last, because copying rows of pixels is fast.
    """
    x = torch.nn.functional.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)])
    dims = len(geometry.kernel)
    for dim, r, s in zip(range(4, 4 + dims), geometry.reach, geometry.stride, strict=True):
        x = x.unfold(dim, r, s)
    for dim, d in zip(range(-dims, 0), geometry.dilation, strict=True):
        x = x.movedim(dim, -1)[..., ::d].movedim(-1, dim)
    samples, count, groups, channels = x.shape[:4]
    x = x.permute(0, 2, 3, *range(4 + dims, 4 + 2 * dims), 1, *range(4, 4 + dims))
    width = channels * math.prod(geometry.kernel)
    patches = x.new_empty(samples, groups, width + bias, count * math.prod(geometry.out_size))
    patches[:, :, :width].view(x.shape).copy_(x)
    if bias:
        patches[:, :, width] = (1 / scale).view(-1, 1, 1)
    return patches


def _pixel_bound(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Σ_τ s_max(X_φ(τ))² [B, groups] for images [B, I, groups, channels, ...]."""
    phases = [
        Counter((d * tap - p) % s for tap in range(k))
        for k, s, p, d in zip(
            geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]
    bound = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float64)
    for phase in itertools.product(*(p.items() for p in phases)):
        pixels = x
        for dim, ((start, _), s) in enumerate(zip(phase, geometry.stride, strict=True), start=4):
            pixels = pixels.movedim(dim, 0)[start::s].movedim(0, dim)
        pixels = pixels.flatten(4).permute(0, 2, 3, 1, 4).flatten(3)
        bound += math.prod(times for _, times in phase) * _largest(pixels)
    return bound


def _largest(x: Tensor) -> Tensor:
    """A bound of s_max² of each X [..., m, n], from the smaller Gram matrix G.

    Exact but for rounding up to 16 rows or columns. ‖G⁸‖_F^(1/8) up to 128, at most 36 % above and
    close to it if the rows have much in common. ‖G‖_F up to 512; beyond that ‖X‖_F².
    """
    side = min(x.shape[-2:])
    if side == 0 or side > MAX_GRAM_SIDE:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64)
        return norm.square() * ROUNDING
    if side <= MAX_EXACT_SIDE:
        return gram_bound(x)
    return gram_bound(x, SQUARINGS if side <= MAX_POWER_SIDE else 0)


def _scale_samples(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Divide each sample [B, ...] by its largest absolute value, which is returned too [B].

    With a bias the divisor is at least 1, the entry of the column of ones.
    """
    x = to_accurate_dtype(x)
    scale = x.abs().flatten(1).amax(1) if x[0].numel() else x.new_zeros(x.shape[0])
    scale = scale.clamp(min=1) if bias else torch.where(scale > 0, scale, 1)
    return x / scale.view(-1, *[1] * (x.dim() - 1)), scale.double()


def _chunks(x: Tensor, numbers_per_sample: int) -> Sequence[Tensor]:
    """Split [B, ...] so that the elements formed for a chunk stay below the limit."""
    return x.split(max(1, MAX_CHUNK_ELEMENTS // max(1, numbers_per_sample)))
