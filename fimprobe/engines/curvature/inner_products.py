"""Inner products of rows in the range of float64, and squares of means without bias."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.moments.scaling import power_of_two_scale

MIN_PRODUCT, MAX_PRODUCT = 1e-20, 1e30
"""Range of a Gram matrix's largest entry in which float32 computes it without loss of range.

Float32 reaches from 1e-38 to 3e38. The margins leave room for smaller entries and for partial sums.
"""


def flatten_positions(x: Tensor) -> Tensor:
    """Reshape to [b, T, width]: all dimensions between the batch and the last are positions."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, without float64 copies of the rows.

    Args:
        a: [b, T, width].
        b: [b, S, width].

    Returns:
        a_t·b_s in float64 [b, T, S].
    """
    gram = a @ b.transpose(1, 2)
    if a.dtype != torch.float64 and not in_float32_range(gram):
        scale_a, scale_b = power_of_two_scale(a), power_of_two_scale(b)
        gram = (a * (1 / scale_a).to(a.dtype)) @ (b * (1 / scale_b).to(b.dtype)).transpose(1, 2)
        return gram.double() * scale_a * scale_b
    return gram.double()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices.

    Args:
        a: B rows [B, P].
        b: As many rows [B, P].

    Returns:
        a·b of each pair of rows, float64 [B].
    """
    return row_products(a.unsqueeze(1), b.unsqueeze(1))[:, 0, 0]


def in_float32_range(gram: Tensor) -> bool:
    """Whether float32 could represent these inner products.

    Always False on a GPU, where the check would wait for the device: a scale is then found anyway.
    """
    if gram.device.type != "cpu" or gram.numel() == 0:
        return False
    low, high = torch.aminmax(gram)
    return MIN_PRODUCT < max(float(high), -float(low)) < MAX_PRODUCT


def unbiased_square(r: Tensor) -> Tensor:
    """Unbiased square of the mean over K independent probes.

    The square of the sample mean contains the probes' own squares, which are too large.

    Args:
        r: [b, K, P].

    Returns:
        [b, P].
    """
    probes = r.shape[1]
    return (r.sum(1).square() - r.square().sum(1)) / (probes * (probes - 1))
