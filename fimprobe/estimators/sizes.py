"""How large the entries of diag F̂ are: their number by half decades."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

STEP = 0.5
"""Of log10."""

MOST = 1024
"""Entries of a tensor that are looked at: of larger ones, these stand for all."""

_LOW, _HIGH = -80, 40
"""log10 of the smallest and the largest entry told apart."""

_GOLDEN = 0.6180339887498949


def count_sizes(diagonals: Iterable[Tensor], scale: float = 1.0) -> list[tuple[float, float]]:
    """Pairs (log10 of the lower end, entries in [lower, lower · √10)), ascending, without empty ones.

    Of ``scale`` · ``diagonals``. Entries that are not above 0 are left out. Of tensors with more than
    ``MOST`` entries that many are counted, spread over all of it, each for several: counts of those
    are estimates. What is 0 but for rounding (a key's bias in attention) is counted as it came out.

    >>> count_sizes([torch.tensor([1.0, 2.0, 50.0, 0.0])])
    [(0.0, 2.0), (1.5, 1.0)]
    """
    parts, weights = [], []
    for diagonal in diagonals:
        entries = _spread(diagonal.detach().reshape(-1))
        if len(entries):
            parts.append(entries)
            weights.append(diagonal.numel() / len(entries))
    if not parts:
        return []
    values = (torch.cat(parts).cpu().double() * scale).log10()
    lengths = torch.tensor([len(part) for part in parts])
    weight = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)
    known = values.isfinite()
    bins = ((values[known].clamp(_LOW, _HIGH) - _LOW) / STEP).floor().long()
    counts = torch.bincount(bins, weights=weight[known])
    return [(_LOW + STEP * i, float(n)) for i, n in enumerate(counts.tolist()) if n > 0]


def _spread(entries: Tensor) -> Tensor:
    """``MOST`` entries at steps that fit no row or column, so that none is met more than others."""
    size = len(entries)
    if size <= MOST:
        return entries
    step = round(_GOLDEN * size)
    while math.gcd(step, size) > 1:
        step += 1
    return entries[torch.arange(MOST, device=entries.device) * step % size]
