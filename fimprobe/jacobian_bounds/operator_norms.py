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
    accurate,
    blocks_norm,
    is_cheap,
    lanczos_norm,
)

EXCESS = 0.1
DENSE_ROWS, DENSE_NUMBERS = 128, 2**20
GRID, SYMBOL_NUMBERS = 5, 2**23
"""Frequencies in each dimension for each degree of a kernel's symbol, complex numbers in all."""


class OperatorNorms(NamedTuple):
    """s_max and ‖·‖_F of one layer's linear operator, as it acts on one input.

    ``spectral`` is infinite where ``compute_spectral`` is false and it is not cheap.
    """

    spectral: float
    frobenius: float


def linear_norms(
    weight: Tensor, positions: int = 1, *, compute_spectral: bool = True
) -> OperatorNorms:
    """Norms of I_T ⊗ W: a matrix [o, d] used at each of T positions.

    s_max is exact where o or d is at most 128, else a bound at most 10 % above; ‖·‖_F = √T ‖W‖_F.

    >>> round(linear_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).frobenius, 9)
    5.0
    """
    matrix, scale = _scaled(weight)
    if scale == 0:
        return OperatorNorms(0.0, 0.0)
    frobenius = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) * ROUNDING
    spectral = math.inf
    if compute_spectral or is_cheap(1, *matrix.shape):
        spectral = min(blocks_norm(matrix[None], excess=EXCESS), frobenius)
    return OperatorNorms(spectral * scale, math.sqrt(positions) * frobenius * scale)


def convolution_norms(
    weight: Tensor,
    window: ConvGeometry,
    *,
    groups: int = 1,
    positions: int = 1,
    compute_spectral: bool = True,
) -> OperatorNorms:
    """Norms of a convolution with zero padding, ``positions`` of them making up one input.

    ‖A‖_F² is each tap's ‖·‖_F² times how often it meets the input. s_max is exact where the operator
    has up to 128 rows or columns; else a bound, by :func:`lanczos_norm` on the images where these
    are small (at most 10 % above), else by :func:`_symbol_norm`.

    >>> window = Window.of((4,), (3,), (1,), (1,), (1,))
    >>> round(convolution_norms(torch.ones(1, 1, 3), window).frobenius ** 2)
    10
    """
    kernel, scale = _scaled(weight)
    if scale == 0:
        return OperatorNorms(0.0, 0.0)
    squares = kernel.square().sum((0, 1), dtype=torch.float64)
    frobenius = math.sqrt(float(weighted(squares, window.counts()[0]).sum()))
    frobenius *= 1 + torch.finfo(kernel.dtype).eps
    frequencies, _ = _grid(window)
    count = math.prod(frequencies[:-1]) * (frequencies[-1] // 2 + 1)
    width = kernel.shape[1] * _phases(window)
    # a product with complex matrices takes about 8 times as long for each entry
    small = math.prod(window.out_size) * math.prod(window.kernel) <= 8 * count
    small = small or count * kernel.shape[0] * width > SYMBOL_NUMBERS
    spectral = _dense_norm(kernel, window, groups)
    if spectral is None and small:
        spectral = _images_norm(kernel, window, groups) if compute_spectral else math.inf
    elif spectral is None:
        compute_spectral = compute_spectral or is_cheap(
            count * groups, kernel.shape[0] // groups, width
        )
        spectral = _symbol_norm(kernel, window, groups) if compute_spectral else math.inf
    if spectral < math.inf:
        spectral = min(spectral, frobenius)
    return OperatorNorms(spectral * scale, math.sqrt(positions) * frobenius * scale)


def _scaled(weight: Tensor) -> tuple[Tensor, float]:
    """W over the largest of its absolute values, and that."""
    matrix = accurate(weight)
    low, high = torch.aminmax(matrix)
    scale = max(float(high), -float(low))
    return (matrix / scale if scale > 0 else matrix), scale


def _dense_norm(kernel: Tensor, window: ConvGeometry, groups: int) -> float | None:
    """From the eigenvalues of the operator's Gram matrix, group by group, if it is small."""
    inputs = kernel.shape[1] * math.prod(window.size)
    outputs = kernel.shape[0] // groups * math.prod(window.out_size)
    small = min(inputs, outputs)
    if small > DENSE_ROWS or groups * inputs * outputs > DENSE_NUMBERS:
        return None
    forward, adjoint = _products(kernel, window, groups)
    turned = outputs < inputs
    shape = (
        [kernel.shape[0] // groups, *window.out_size] if turned else ([kernel.shape[1], *window.size])
    )
    units = torch.eye(small, dtype=kernel.dtype, device=kernel.device).view(small, 1, *shape)
    units = units.expand(-1, groups, *shape).reshape(small, groups * shape[0], *shape[1:])
    columns = adjoint(units) if turned else forward(units)
    blocks = columns.reshape(small, groups, -1).transpose(0, 1)
    return blocks_norm(blocks, excess=EXCESS)


def _images_norm(kernel: Tensor, window: ConvGeometry, groups: int) -> float:
    """By Lanczos steps with the convolution itself and its adjoint."""
    forward, adjoint = _products(kernel, window, groups)
    inputs = [kernel.shape[1] * groups, *window.size]
    outputs = [kernel.shape[0], *window.out_size]
    if math.prod(inputs) <= math.prod(outputs):
        gram = lambda v: adjoint(forward(v.view(-1, *inputs))).flatten(1)  # noqa: E731
    else:
        gram = lambda v: forward(adjoint(v.view(-1, *outputs))).flatten(1)  # noqa: E731
    like = kernel.new_empty(min(math.prod(inputs), math.prod(outputs)))
    return lanczos_norm(gram, like, excess=EXCESS)


def _symbol_norm(kernel: Tensor, window: ConvGeometry, groups: int) -> float:
    """By the symbol: the matrices K̂(ω) = Σ_τ K_τ e^(iωτ) that the convolution is on the plane waves.

    With stride s, of the kernel between s^dims interleaved images and the output. Zero padding cuts
    the operator out of the one on all of Z^dims, and out of a periodic one that has room for image
    and kernel: s_max(A) is at most max_ω s_max(K̂(ω)), over all ω or those of the period. u*K̂(ω)v
    is, up to a phase, of exponential type (q−1)/2 for q taps: around its maximum it falls no faster
    than a cosine, and N frequencies miss at most the factor cos(π(q−1)/2N) in each dimension, 5 %
    with N = 5(q−1). How far the bound is above that depends on what the image's border takes.

    Source: Sedghi, Gupta & Long 2019 for the periodic one; M. Riesz 1914 for the cosine.
    """
    frequencies, missed = _grid(window)
    for dim, (k, s, d) in enumerate(
        zip(window.kernel, window.stride, window.dilation, strict=True), start=2
    ):
        if s == 1:  # a dilated kernel is the same on each of the interleaved images
            continue
        taps, phases, reach = _taps(k, s, d)
        spread = kernel.new_zeros(*kernel.shape[:dim], taps * phases, *kernel.shape[dim + 1 :])
        spread.narrow(dim, 0, reach).movedim(dim, 0)[::d] = kernel.movedim(dim, 0)
        kernel = spread.unflatten(dim, (taps, phases)).movedim(dim + 1, 1).flatten(1, 2)
    turns = kernel.new_zeros(1, 1)  # ω·τ/2π [frequencies, taps]; half of the last dimension is enough
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
    return blocks_norm(blocks, excess=EXCESS) / missed


def _grid(window: ConvGeometry) -> tuple[list[int], float]:
    """Frequencies N in each dimension, and what is left at worst of a maximum between them."""
    found, left = [], 1.0
    for n, k, s, d in zip(window.size, window.kernel, window.stride, window.dilation, strict=True):
        taps, _, _ = _taps(k, s, d)
        period = math.ceil(n / (d if s == 1 else s)) + (s > 1) + taps - 1
        count = max(1, min(period, GRID * (taps - 1)))
        if count < period:
            left *= math.cos(math.pi * (taps - 1) / (2 * count))
        found.append(count)
    return found, left


def _taps(kernel: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """Taps on each of the interleaved images, how many of these, taps with those between."""
    if stride == 1:
        return kernel, 1, kernel
    reach = dilation * (kernel - 1) + 1
    return math.ceil(reach / stride), min(stride, reach), reach


def _phases(window: ConvGeometry) -> int:
    options = zip(window.kernel, window.stride, window.dilation, strict=True)
    return math.prod(_taps(k, s, d)[1] for k, s, d in options)


def _products(
    kernel: Tensor, window: ConvGeometry, groups: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The convolution of a batch of images, and its adjoint."""
    options = (None, window.stride, window.padding, window.dilation)
    nothing = [0] * len(window.size)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, kernel, *options, False, nothing, groups)

    def adjoint(y: Tensor) -> Tensor:
        return torch.ops.aten.convolution(y, kernel, *options, True, window.output_padding, groups)

    return forward, adjoint
