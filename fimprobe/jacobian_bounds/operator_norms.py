"""Norms of the linear operators that layers are made of, in float64 and never too small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.jacobian_bounds.conv_geometry import ConvGeometry, weighted
from fimprobe.jacobian_bounds.spectral_norm import (
    ROUNDING,
    blocks_norm,
    is_cheap,
    lanczos_norm,
    to_accurate_dtype,
)

EXCESS = 0.1
"""Bounds by Lanczos steps are at most 10 % above the norm."""

MAX_DENSE_ROWS, MAX_DENSE_ELEMENTS = 128, 2**20
"""Rows and elements up to which the matrix of a convolution is formed."""

FREQUENCIES_PER_DEGREE, MAX_SYMBOL_ELEMENTS = 5, 2**23
"""Frequencies in each dimension for each degree of a kernel's symbol; complex numbers in all."""


class OperatorNorms(NamedTuple):
    """Norms of one layer's linear operator, as it acts on one input.

    Attributes:
        spectral: s_max; infinite if it was not requested and is not cheap.
        frobenius: ‖·‖_F.
    """

    spectral: float
    frobenius: float


def linear_norms(
    weight: Tensor, positions: int = 1, *, compute_spectral: bool = True
) -> OperatorNorms:
    """Norms of I_T ⊗ W, a matrix that is used at each of T positions.

    s_max is exact if o or d is at most 128, else a bound at most 10 % above it. ‖·‖_F = √T ‖W‖_F.

    Args:
        weight: The matrix W [o, d].
        positions: T.
        compute_spectral: Whether s_max is computed even if it is expensive.

    >>> round(linear_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).frobenius, 9)
    5.0
    """
    matrix, scale = _scale_weight(weight)
    if scale == 0:
        return OperatorNorms(0.0, 0.0)
    frobenius = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) * ROUNDING
    spectral = math.inf
    if compute_spectral or is_cheap(1, *matrix.shape):
        spectral = min(blocks_norm(matrix[None], excess=EXCESS), frobenius)
    return OperatorNorms(spectral * scale, math.sqrt(positions) * frobenius * scale)


def convolution_norms(
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    groups: int = 1,
    positions: int = 1,
    compute_spectral: bool = True,
) -> OperatorNorms:
    """Norms of a convolution with zero padding.

    ‖A‖_F² is the sum over taps of ‖·‖_F² times the outputs at which the tap reads an input. s_max is
    exact if the operator has up to 128 rows or columns. Else it is a bound: for small images by
    :func:`lanczos_norm` on them (at most 10 % above), for others by :func:`_symbol_norm`.

    Args:
        weight: The kernel [O, C, ...].
        geometry: The place of the kernel on an image.
        groups: Groups of the convolution.
        positions: Images that make up one input of the model.
        compute_spectral: Whether s_max is computed even if it is expensive.

    >>> geometry = ConvGeometry.of((4,), (3,), (1,), (1,), (1,))
    >>> round(convolution_norms(torch.ones(1, 1, 3), geometry).frobenius ** 2)
    10
    """
    kernel, scale = _scale_weight(weight)
    if scale == 0:
        return OperatorNorms(0.0, 0.0)
    squares = kernel.square().sum((0, 1), dtype=torch.float64)
    frobenius = math.sqrt(float(weighted(squares, geometry.counts()[0]).sum()))
    frobenius *= 1 + torch.finfo(kernel.dtype).eps
    frequencies, _ = _frequency_grid(geometry)
    count = math.prod(frequencies[:-1]) * (frequencies[-1] // 2 + 1)
    width = kernel.shape[1] * _phases(geometry)
    # a product with complex matrices takes about 8 times as long for each entry
    small = math.prod(geometry.out_size) * math.prod(geometry.kernel) <= 8 * count
    small = small or count * kernel.shape[0] * width > MAX_SYMBOL_ELEMENTS
    spectral = _dense_norm(kernel, geometry, groups)
    if spectral is None and small:
        spectral = _images_norm(kernel, geometry, groups) if compute_spectral else math.inf
    elif spectral is None:
        compute_spectral = compute_spectral or is_cheap(
            count * groups, kernel.shape[0] // groups, width
        )
        spectral = _symbol_norm(kernel, geometry, groups) if compute_spectral else math.inf
    if spectral < math.inf:
        spectral = min(spectral, frobenius)
    return OperatorNorms(spectral * scale, math.sqrt(positions) * frobenius * scale)


def _scale_weight(weight: Tensor) -> tuple[Tensor, float]:
    """Divide a weight by its largest absolute value, which is returned too; 0 for zeros."""
    matrix = to_accurate_dtype(weight)
    low, high = torch.aminmax(matrix)
    scale = max(float(high), -float(low))
    return (matrix / scale if scale > 0 else matrix), scale


def _dense_norm(kernel: Tensor, geometry: ConvGeometry, groups: int) -> float | None:
    """s_max from the eigenvalues of each group's Gram matrix; None if it is large."""
    inputs = kernel.shape[1] * math.prod(geometry.size)
    outputs = kernel.shape[0] // groups * math.prod(geometry.out_size)
    small = min(inputs, outputs)
    if small > MAX_DENSE_ROWS or groups * inputs * outputs > MAX_DENSE_ELEMENTS:
        return None
    forward, adjoint = _products(kernel, geometry, groups)
    use_adjoint = outputs < inputs
    shape = (
        [kernel.shape[0] // groups, *geometry.out_size]
        if use_adjoint
        else ([kernel.shape[1], *geometry.size])
    )
    units = torch.eye(small, dtype=kernel.dtype, device=kernel.device).view(small, 1, *shape)
    units = units.expand(-1, groups, *shape).reshape(small, groups * shape[0], *shape[1:])
    columns = adjoint(units) if use_adjoint else forward(units)
    blocks = columns.reshape(small, groups, -1).transpose(0, 1)
    return blocks_norm(blocks, excess=EXCESS)


def _images_norm(kernel: Tensor, geometry: ConvGeometry, groups: int) -> float:
    """A bound of s_max by Lanczos steps with the convolution and its adjoint."""
    forward, adjoint = _products(kernel, geometry, groups)
    inputs = [kernel.shape[1] * groups, *geometry.size]
    outputs = [kernel.shape[0], *geometry.out_size]
    if math.prod(inputs) <= math.prod(outputs):
        gram = lambda v: adjoint(forward(v.view(-1, *inputs))).flatten(1)  # noqa: E731
    else:
        gram = lambda v: forward(adjoint(v.view(-1, *outputs))).flatten(1)  # noqa: E731
    like = kernel.new_empty(min(math.prod(inputs), math.prod(outputs)))
    return lanczos_norm(gram, like, excess=EXCESS)


def _symbol_norm(kernel: Tensor, geometry: ConvGeometry, groups: int) -> float:
    """A bound of s_max by the symbol K̂(ω) = Σ_τ K_τ e^(iωτ), the convolution on plane waves.

    With stride s the kernel maps s^dims interleaved images to the output. Zero padding cuts the
    operator out of the one on all of Z^dims, and out of a periodic one that has room for image and
    kernel. Hence s_max(A) is at most max_ω s_max(K̂(ω)), over all ω or those of the period.

    Up to a phase, u*K̂(ω)v is of exponential type (q−1)/2 for q taps. Around its maximum it falls no
    faster than a cosine, so that N frequencies miss at most the factor cos(π(q−1)/2N) in each
    dimension: 5 % with N = 5(q−1). Beyond that the bound is loose by the effect of the border.

    Source: Sedghi, Gupta & Long 2019 for the periodic one; M. Riesz 1914 for the cosine.
    """
    frequencies, share = _frequency_grid(geometry)
    for dim, (k, s, d) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True), start=2
    ):
        if s == 1:  # a dilated kernel is the same on each of the interleaved images
            continue
        taps, phases, reach = _taps(k, s, d)
        spread = kernel.new_zeros(*kernel.shape[:dim], taps * phases, *kernel.shape[dim + 1 :])
        spread.narrow(dim, 0, reach).movedim(dim, 0)[::d] = kernel.movedim(dim, 0)
        kernel = spread.unflatten(dim, (taps, phases)).movedim(dim + 1, 1).flatten(1, 2)
    # ω·τ/2π [frequencies, taps]; a real kernel needs half of the frequencies in the last dimension
    turns = kernel.new_zeros(1, 1)
    for dim, (n, taps) in enumerate(zip(frequencies, kernel.shape[2:], strict=True)):
        half = n // 2 + 1 if dim == len(frequencies) - 1 else n
        along = torch.outer(torch.arange(half), torch.arange(taps)).to(kernel) / n
        turns = (turns[:, None, :, None] + along[:, None]).flatten(0, 1).flatten(1)
    taps = kernel.flatten(2).unflatten(0, (groups, -1)).permute(3, 0, 1, 2)
    real, imaginary = (
        (f(2 * math.pi * turns) @ taps.flatten(1)).view(-1, *taps.shape[2:])
        for f in (torch.cos, torch.sin)
    )
    blocks = torch.complex(real, imaginary)
    return blocks_norm(blocks, excess=EXCESS) / share


def _frequency_grid(geometry: ConvGeometry) -> tuple[list[int], float]:
    """Frequencies N in each dimension, and the share of a maximum that they reach at least."""
    counts, share = [], 1.0
    for n, k, s, d in zip(
        geometry.size, geometry.kernel, geometry.stride, geometry.dilation, strict=True
    ):
        taps, _, _ = _taps(k, s, d)
        period = math.ceil(n / (d if s == 1 else s)) + (s > 1) + taps - 1
        count = max(1, min(period, FREQUENCIES_PER_DEGREE * (taps - 1)))
        if count < period:
            share *= math.cos(math.pi * (taps - 1) / (2 * count))
        counts.append(count)
    return counts, share


def _taps(kernel: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """Taps on each interleaved image, the number of those images, and the taps with their gaps."""
    if stride == 1:
        return kernel, 1, kernel
    reach = dilation * (kernel - 1) + 1
    return math.ceil(reach / stride), min(stride, reach), reach


def _phases(geometry: ConvGeometry) -> int:
    """The number of interleaved images that a kernel reads."""
    options = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    return math.prod(_taps(k, s, d)[1] for k, s, d in options)


def _products(
    kernel: Tensor, geometry: ConvGeometry, groups: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The convolution of a batch of images, and its adjoint, as functions."""
    options = (None, geometry.stride, geometry.padding, geometry.dilation)
    no_padding = [0] * len(geometry.size)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, kernel, *options, False, no_padding, groups)

    def adjoint(y: Tensor) -> Tensor:
        return torch.ops.aten.convolution(y, kernel, *options, True, geometry.output_padding, groups)

    return forward, adjoint
