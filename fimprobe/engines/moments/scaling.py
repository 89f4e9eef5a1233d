"""The scaling that keeps fourth powers of gradients inside float32's range."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-126
"""Gradients are not divided by less: the smallest power of two whose reciprocal float32 holds.

Smaller gradients have lost digits to underflow before they are measured.
"""


def in_float32_range(fourth: Tensor, scale: Tensor | None) -> bool:
    """Whether fourth powers neither overflowed nor vanished in float32.

    Above the lower limit, powers that were flushed to zero (below 1e-38) are less than a billionth
    of the sum.

    Args:
        fourth: Sums of fourth powers.
        scale: Scale of the gradients; with one the powers are in range, and are not inspected.
    """
    if scale is not None or fourth.dtype == torch.float64:
        return True
    return 1e-20 < float(fourth.sum()) < 1e30


def undo_scale(square: Tensor, scale: Tensor | None) -> Tensor:
    """Squares of gradients, from squares of the gradients divided by ``scale``.

    Args:
        square: Squares or sums of squares, of any shape.
        scale: The power of two that the gradients were divided by; None for 1.

    Returns:
        ``square`` · ``scale``², in the type of ``square``.
    """
    return square if scale is None or is_one(scale) else square * scale.to(square.dtype) ** 2


def power_of_two_scale(*tensors: Tensor) -> Tensor:
    """The power of two just above the product of the tensors' largest magnitudes; 1 for zero.

    Division by a power of two is exact, and fourth powers then stay inside float32's range. On a CPU
    the scale is also 1 for a moderate product; on a GPU the comparison would wait for the device.
    The scale is at least :data:`SMALLEST_SCALE`.
    """
    product = torch.ones((), dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        low, high = torch.aminmax(x)
        product = product * torch.maximum(-low, high).double()
    if product.device.type == "cpu" and (float(product) == 0 or 1e-3 < float(product) < 1e3):
        return torch.ones_like(product)
    product = torch.where((product > 0) & torch.isfinite(product), product, 1.0)
    return torch.exp2(torch.ceil(torch.log2(product))).clamp(min=SMALLEST_SCALE)


def is_one(scale: Tensor) -> bool:
    """Whether a scale is known to be 1; False on a GPU, where reading it would wait."""
    return scale.device.type == "cpu" and float(scale) == 1
