"""Rademacher signs that depend on the seed and the sample alone, not on chunks or the device."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def signs(
    shape: torch.Size | tuple[int, ...],
    key: str,
    seed: int,
    *,
    first: int = 0,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """±1 with equal odds, in ``shape``; row r is that of sample ``first`` + r.

    A counter (sample, word) is hashed as by splitmix64, 32 signs are taken from each word. ``key``
    separates the streams of one seed.

    >>> a = signs((6, 5), "v", 3, dtype=torch.float32, device="cpu")
    >>> b = signs((2, 5), "v", 3, first=4, dtype=torch.float32, device="cpu")
    >>> torch.equal(a[4:], b), a.abs().unique().tolist()
    (True, [1.0])
    """
    rows, width = shape[0], math.prod(shape[1:])
    words = max(1, -(-width // 32))
    start = (zlib.crc32(key.encode()) << 31) ^ (seed * 0x9E3779B97F4A7C15 & (2**62 - 1))
    count = torch.arange(rows, device=device).unsqueeze(1) + first
    x = count * words + torch.arange(words, device=device) + 1
    x = x * _GOLDEN + (start % 2**62)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    x = x ^ ((x >> 31) & (2**33 - 1))
    bits = (x & 0xFFFFFFFF).unsqueeze(-1) >> torch.arange(32, device=device)
    bits = bits.to(torch.uint8).bitwise_and_(1)
    flat = bits.view(rows, -1)[:, :width].to(dtype).mul_(2).sub_(1)
    return flat.reshape(shape)


def random_direction(parameter: Tensor, key: str, seed: int) -> Tensor:
    """A direction ±1 of a parameter."""
    shape = (1, *parameter.shape)
    return signs(shape, key, seed, dtype=parameter.dtype, device=parameter.device)[0]
