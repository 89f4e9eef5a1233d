"""Entries that stand for all of a tensor's."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MOST = 1024
"""Entries that are taken of a larger tensor."""

_GOLDEN = 0.6180339887498949


def spread(x: Tensor) -> Tensor:
    """All entries of a small tensor, ``MOST`` of a larger one, at steps that fit no row or column.

    >>> len(spread(torch.ones(3, 5))), len(spread(torch.ones(300, 50)))
    (15, 1024)
    """
    entries = x.detach().reshape(-1)
    return entries if len(entries) <= MOST else entries[_places(len(entries), entries.device)]


@functools.lru_cache(maxsize=256)
def _places(size: int, device: torch.device) -> Tensor:
    step = round(_GOLDEN * size)
    while math.gcd(step, size) > 1:
        step += 1
    return torch.arange(MOST, device=device) * step % size
