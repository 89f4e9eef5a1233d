"""How large the entries of diag F̂ are: their number by half decades."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STEP = 0.5
"""Of log10."""

_LOW, _HIGH = -80, 40
"""log10 of the smallest and the largest entry told apart."""


def diagonal_histogram(
    samples: Iterable[tuple[Tensor, int]], scale: float = 1.0
) -> list[tuple[float, float]]:
    """Pairs (log10 of the lower end, entries in [lower, lower · √10)), ascending, without empty ones.

    Of ``scale`` · the entries of diagonals, given as
    :func:`fimprobe.statistics.subsample_entries` of each and its size. Entries that are not above 0 are left out. Each of a sample counts for several, so that
    the counts are estimates. What is 0 but for rounding (a key's bias in attention) is counted as it
    is.

    >>> count_sizes([(torch.tensor([1.0, 2.0, 50.0, 0.0]), 4)])
    [(0.0, 2.0), (1.5, 1.0)]
    """
    known_sizes = [(entries, size) for entries, size in samples if len(entries)]
    parts = [entries for entries, _ in known_sizes]
    weights = [size / len(entries) for entries, size in known_sizes]
    if not parts:
        return []
    values = (torch.cat(parts).cpu() * scale).log10()
    lengths = torch.tensor([len(part) for part in parts])
    weight = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)
    weight *= values.isfinite()
    bins = ((values.nan_to_num(0.0, 0.0, 0.0).clamp(_LOW, _HIGH) - _LOW) / STEP).long()
    counts = torch.bincount(bins, weights=weight)
    return [(_LOW + STEP * i, float(n)) for i, n in enumerate(counts.tolist()) if n > 0]
