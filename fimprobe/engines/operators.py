"""Norms of the linear operators that layers are made of, in float64 and never too small."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1 + 1e-11
"""What float64 arithmetic may take from a norm of the sizes met here, with room to spare."""
DENSE_LINEAR, DENSE_CONVOLUTION, DENSE_INPUTS, GRAM_INPUTS = 1024, 512, 128, 512
LANCZOS_STEPS, LANCZOS_FAILURE, LANCZOS_NUMBERS = 64, 1e-10, 2**25
CHUNK_NUMBERS = 2**22


class Norms(NamedTuple):
    """s_max and ‖·‖_F of one layer's linear operator, as it acts on one input."""

    spectral: float
    frobenius: float


class InputNorms(NamedTuple):
    """Of each input's X̃, whose rows meet the weights: z = X̃ Wᵀ, hence ∂z/∂W = X̃ ⊗ I.

    ``spectral`` [B] bounds s_max(X̃), ``frobenius`` [B] is ‖X̃‖_F; with g groups of o/g outputs X̃
    is block diagonal and ‖∂z/∂W‖_F² = Σ_g (o/g) ‖X̃_g‖_F² = (o/g) ``frobenius``².
    """

    spectral: Tensor
    frobenius: Tensor


def wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def linear_norms(weight: Tensor, positions: int = 1) -> Norms:
    """Norms of I_T ⊗ W: a matrix [o, d] used at each of T positions.

    s_max from the eigenvalues of the smaller Gram matrix up to 1024 rows, else by
    :func:`lanczos_norm`; ‖·‖_F = √T ‖W‖_F.

    >>> linear_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).frobenius
    5.0
    """
    matrix = wide(weight)
    scale = float(matrix.abs().max())
    if scale == 0:
        return Norms(0.0, 0.0)
    matrix = matrix / scale
    frobenius = float(torch.linalg.vector_norm(matrix))
    if min(matrix.shape) <= DENSE_LINEAR:
        spectral = float(_gram_norm(matrix))
    else:
        matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
        spectral = lanczos_norm(
            lambda v: matrix.t() @ (matrix @ v), matrix.new_empty(matrix.shape[1])
        )
        spectral = min(spectral, frobenius * ROUNDING)
    return Norms(spectral * scale, math.sqrt(positions) * frobenius * scale)


def convolution_norms(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    positions: int = 1,
) -> Norms:
    """Norms of a convolution with zero padding of inputs of spatial ``size``, ``positions`` of them
    making up one input.

    ‖A‖_F² = Σ (ones ∗ W²) counts how often each tap is used: exact. s_max is exact (eigenvalues of
    A's Gram matrix, group by group) where that has up to 512 rows; else the least of ‖A‖_F,
    √(‖A‖₁ ‖A‖_∞) and :func:`lanczos_norm`, of which the last is the one that may fail, at most
    once in 10¹⁰.

    >>> unit = dict(stride=(1,), padding=(1,), dilation=(1,))
    >>> round(convolution_norms(torch.ones(1, 1, 3), (4,), **unit).frobenius ** 2)
    10
    """
    kernel = wide(weight)
    scale = float(kernel.abs().max())
    if scale == 0:
        return Norms(0.0, 0.0)
    kernel = kernel / scale
    dims = len(size)
    stride, padding, dilation = (_each(x, dims) for x in (stride, padding, dilation))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    out_size = [
        (n + 2 * p - r - 1) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)
    ]
    left_over = [
        n - ((m - 1) * s - 2 * p + r + 1)
        for n, m, p, r, s in zip(size, out_size, padding, reach, stride, strict=True)
    ]

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(
            x, w, None, stride, padding, dilation, False, [0] * dims, groups
        )

    def adjoint(y: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(
            y, w, None, stride, padding, dilation, True, left_over, groups
        )

    x = kernel.new_ones(1, kernel.shape[1] * groups, *size)
    y = kernel.new_ones(1, kernel.shape[0], *out_size)
    frobenius = float(forward(x, kernel.square()).sum().sqrt())
    rows, columns = x.numel() // groups, y.numel() // groups
    small = min(rows, columns)
    if small <= DENSE_CONVOLUTION and groups * small**3 <= 2**28 and x.numel() * columns <= 2**24:
        this, that, apply = (x, y, forward) if rows <= columns else (y, x, adjoint)
        basis = torch.eye(small, dtype=x.dtype, device=x.device)
        channels = this.shape[1] // groups
        units = basis.view(small, 1, channels, *this.shape[2:]).expand(-1, groups, *[-1] * (dims + 1))
        columns_of = apply(units.reshape(small, *this.shape[1:]), kernel)
        blocks = columns_of.reshape(small, groups, that.numel() // groups).transpose(0, 1)
        spectral = float(_gram_norm(blocks).max())
    else:
        magnitude = kernel.abs()
        holder = math.sqrt(float(forward(x, magnitude).max()) * float(adjoint(y, magnitude).max()))

        def gram(v: Tensor) -> Tensor:
            if x.numel() <= y.numel():
                return adjoint(forward(v.view_as(x), kernel), kernel).flatten()
            return forward(adjoint(v.view_as(y), kernel), kernel).flatten()

        start = (x if x.numel() <= y.numel() else y).flatten()
        spectral = min(holder * ROUNDING, frobenius * ROUNDING, lanczos_norm(gram, start))
    return Norms(spectral * scale, math.sqrt(positions) * frobenius * scale)


def lanczos_norm(gram: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """A bound of s_max(A) that fails with probability at most δ = 1e-10, from v ↦ AᵀA v on R^n.

    k Lanczos steps from a start v uniform on the sphere give a Ritz value θ ≤ λ = s_max²; the bound
    is √(θ/(1−ε)). If θ < (1−ε)λ, the polynomial that turns into the Chebyshev T_{2k−1} on the
    eigenvalues below (1−ε)λ shows |v₁| sinh((2k−1) artanh√ε) < 1 for v₁ = v·(top eigenvector), and
    P(|v₁| < a) ≤ a √(2n/π). So √ε = tanh(arsinh(√(2n/π)/δ)/(2k−1)); with k = 64 the bound is at
    most 2 to 4 % above s_max, whatever the spectrum.

    Source: Kuczyński & Woźniakowski 1992, theorem 4.2, with the constant worked out.
    """
    size = like.numel()
    steps = max(1, min(LANCZOS_STEPS, size, LANCZOS_NUMBERS // size))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(size, generator=generator, dtype=torch.float64).to(like.device)
    basis = like.new_zeros(steps, size, dtype=torch.float64)
    small = torch.zeros(steps, steps, dtype=torch.float64)
    basis[0] = v / torch.linalg.vector_norm(v)
    reached = steps
    for k in range(steps):
        w = gram(basis[k])
        small[k, k] = basis[k] @ w
        if k + 1 == steps and steps < size:
            break
        for _ in range(2):  # orthogonal to working precision takes two passes
            w = w - basis[: k + 1].t() @ (basis[: k + 1] @ w)
        beta = float(torch.linalg.vector_norm(w))
        if k + 1 == size or beta <= 1e-13 * float(small[0, 0]):
            reached = LANCZOS_STEPS  # the subspace is invariant: more steps would change nothing
            break
        small[k, k + 1] = small[k + 1, k] = beta
        basis[k + 1] = w / beta
    theta = max(0.0, float(torch.linalg.eigvalsh(small)[-1]))
    angle = math.asinh(math.sqrt(2 * size / math.pi) / LANCZOS_FAILURE) / (2 * reached - 1)
    return math.sqrt(theta) * math.cosh(angle) * ROUNDING  # 1/√(1−tanh²) = cosh


def linear_input_norms(rows: Tensor, *, weight: bool, bias: bool) -> InputNorms:
    """Norms of X̃ for the rows [B, T, d] that a Linear layer was given, with a column of ones for
    the bias; without either part where it is not trained.
    """
    if not weight:
        rows = rows[..., :0]
    if rows.shape[1] == 1:
        norm = _euclid(rows, bias)
        return InputNorms(norm.cpu(), norm.cpu())
    return _stack([_input_norms(part.unsqueeze(1), bias) for part in _chunks(rows, rows[0].numel())])


def convolution_input_norms(
    images: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> InputNorms:
    """Norms of the patch matrices X̃ of ``images`` [B, I, C, ...], I of them belonging to one input.

    s_max is replaced by ‖XᵀX‖_F^½ or ‖X‖_F where a patch matrix has more than 128 or 512 rows and
    columns.
    """
    samples, count, channels = images.shape[:3]
    stride, padding, dilation = (_each(x, len(kernel)) for x in (stride, padding, dilation))
    width = channels // groups * math.prod(kernel)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sides = [side for p in reversed(padding) for side in (p, p)]
    dims = range(3, 3 + len(kernel))
    length = count * math.prod(
        (n + 2 * p - r) // s + 1
        for n, p, r, s in zip(images.shape[3:], padding, reach, stride, strict=True)
    )
    found = []
    if min(length, width + bias) > GRAM_INPUTS:
        ones = wide(images.new_ones(groups, channels // groups, *kernel))
        for part in _chunks(images, images[0].numel()):
            squares = torch.ops.aten.convolution(
                wide(part).square().flatten(0, 1),
                ones,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(kernel),
                groups,
            )
            per_group = squares.reshape(len(part), count, groups, -1).sum((1, 3)) + length * bias
            norms = InputNorms(per_group.amax(1).sqrt(), per_group.sum(1).sqrt())
            found.append(InputNorms(norms.spectral.cpu() * ROUNDING, norms.frobenius.cpu()))
        return _stack(found)
    for part in _chunks(images, length * width * groups):
        x = torch.nn.functional.pad(wide(part), sides)
        for dim, r, s in zip(dims, reach, stride, strict=True):
            x = x.unfold(dim, r, s)
        for dim, d in zip(range(-len(kernel), 0), dilation, strict=True):
            x = x.movedim(dim, -1)[..., ::d].movedim(-1, dim)
        x = x.reshape(len(part), count, groups, channels // groups, -1, math.prod(kernel))
        x = x.permute(0, 2, 1, 4, 3, 5).reshape(len(part), groups, length, width)
        found.append(_input_norms(x, bias))
    return _stack(found)


def bias_norms(samples: int, positions: int, groups: int = 1) -> InputNorms:
    """X̃ = 1, a column: where only the bias is trained."""
    norm = torch.full((samples,), math.sqrt(positions), dtype=torch.float64)
    return InputNorms(norm, norm * math.sqrt(groups))


def _each(option: Sequence[int], dims: int) -> Sequence[int]:
    """One number for each dimension: torch keeps (0,) for the padding "valid"."""
    return list(option) * dims if len(option) == 1 else option


def _chunks(x: Tensor, numbers_per_sample: int) -> Sequence[Tensor]:
    return x.split(max(1, CHUNK_NUMBERS // max(1, numbers_per_sample)))


def _stack(found: list[InputNorms]) -> InputNorms:
    return InputNorms(torch.cat([x.spectral for x in found]), torch.cat([x.frobenius for x in found]))


def _euclid(x: Tensor, bias: bool) -> Tensor:
    """√(Σ x² + number of rows, if they carry a one) over all but the first dimension."""
    norm = torch.linalg.vector_norm(wide(x).flatten(1), dim=1)
    ones = math.prod(x.shape[1:-1]) * bias
    return torch.hypot(norm, norm.new_tensor(math.sqrt(ones)))


def _input_norms(x: Tensor, bias: bool) -> InputNorms:
    """Norms of [n, g, T, d] with a column of ones for the bias."""
    frobenius = _euclid(x, bias)
    x = wide(x)
    if bias:
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
    spectral = torch.linalg.vector_norm(x, dim=(2, 3)) * ROUNDING
    if 0 < min(x.shape[2:]) <= DENSE_INPUTS:
        spectral = torch.minimum(spectral, _gram_norm(x))
    elif min(x.shape[2:]) <= GRAM_INPUTS:
        gram = x.transpose(2, 3) @ x if x.shape[3] <= x.shape[2] else x @ x.transpose(2, 3)
        spectral = torch.minimum(
            spectral, torch.linalg.vector_norm(gram, dim=(2, 3)).sqrt() * ROUNDING
        )
    return InputNorms(spectral.amax(1).cpu(), frobenius.cpu())


def _gram_norm(matrix: Tensor) -> Tensor:
    """s_max of [..., m, n] from the eigenvalues of the smaller Gram matrix."""
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(scale > 0, scale, 1)
    if matrix.shape[-2] <= matrix.shape[-1]:
        gram = scaled @ scaled.transpose(-1, -2)
    else:
        gram = scaled.transpose(-1, -2) @ scaled
    largest = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
    return largest.sqrt() * scale[..., 0, 0] * ROUNDING
