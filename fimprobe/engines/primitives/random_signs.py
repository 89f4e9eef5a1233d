"""Rademacher signs that depend on the seed and the sample only, not on chunks or the device."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""splitmix64's increment and multipliers, as signed 64-bit integers."""


def rademacher(
    shape: torch.Size | tuple[int, ...],
    key: str,
    seed: int,
    *,
    first: int = 0,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Draw independent ±1 with equal probability.

    splitmix64 hashes a counter of (sample, word); each word yields 32 signs. A generator of torch
    would make the signs depend on the device and on how samples are cut into chunks.

    Args:
        shape: Shape of the result; the first dimension counts samples.
        key: Name of the stream: different keys give independent signs.
        seed: The random seed.
        first: Number of the sample in the first row.
        dtype: Type of the result.
        device: Device of the result.

    >>> a = rademacher((6, 5), "v", 3, dtype=torch.float32, device="cpu")
    >>> b = rademacher((2, 5), "v", 3, first=4, dtype=torch.float32, device="cpu")
    >>> torch.equal(a[4:], b), a.abs().unique().tolist()
    (True, [1.0])
    """
    rows, width = shape[0], math.prod(shape[1:])
    words = max(1, -(-width // 32))
    start = (zlib.crc32(key.encode()) << 31) ^ (seed * 0x9E3779B97F4A7C15 & (2**62 - 1))
    count = torch.arange(rows, device=device).unsqueeze(1) + first
    x = count * words + torch.arange(words, device=device) + 1
    x = x * _GOLDEN_GAMMA + (start % 2**62)
    # torch shifts signed integers arithmetically: the masks clear the copies of the sign bit
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    x = x ^ ((x >> 31) & (2**33 - 1))
    bits = (x & 0xFFFFFFFF).unsqueeze(-1) >> torch.arange(32, device=device)
    bits = bits.to(torch.uint8).bitwise_and_(1)
    signs = bits.view(rows, -1)[:, :width].to(dtype).mul_(2).sub_(1)
    return signs.reshape(shape)


def random_direction(parameter: Tensor, key: str, seed: int) -> Tensor:
    """Draw a direction ±1 for a parameter.

    Args:
        parameter: The parameter, whose shape, type and device the direction has.
        key: Name of the stream.
        seed: The random seed.
    """
    shape = (1, *parameter.shape)
    return rademacher(shape, key, seed, dtype=parameter.dtype, device=parameter.device)[0]
