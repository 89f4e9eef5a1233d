"""The sizes of the entries of diag F̂: their number in half decades."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STEP = 0.5
"""Width of a bin in log10."""

_LOW, _HIGH = -80, 40
"""log10 of the smallest and the largest entry with a bin of its size; others are clamped to these."""

_NONE = round((_HIGH - _LOW) / STEP) + 1
"""Index after the last bin, for entries that have no logarithm."""


def diagonal_histogram(
    samples: Iterable[tuple[Tensor, int]], scale: float = 1.0
) -> list[tuple[float, float]]:
    """Return a histogram of the diagonal's entries in half-decade bins.

    Each entry of a subsample counts for several, so that the counts are estimates. Entries that are
    not positive are left out. Entries that are 0 up to rounding (the bias of a key in attention) are
    counted with their rounded value.

    Args:
        samples: For each parameter, a subsample of its diagonal
            (:func:`fimprobe.statistics.subsample_entries`) and its full size.
        scale: Factor applied to every entry.

    Returns:
        (log10 of the lower bin edge, number of entries) for every non-empty bin, ascending.

    >>> diagonal_histogram([(torch.tensor([1.0, 2.0, 50.0, 0.0]), 4)])
    [(0.0, 2.0), (1.5, 1.0)]
    """
    nonempty = [(entries, size) for entries, size in samples if entries.numel()]
    if not nonempty:
        return []
    subsamples = [entries for entries, _ in nonempty]
    lengths = [entries.numel() for entries in subsamples]
    multiplicities = [size / length for (_, size), length in zip(nonempty, lengths, strict=True)]
    logs = (torch.cat(subsamples).cpu() * scale).log10()
    bins = ((logs.clamp(_LOW, _HIGH) - _LOW) / STEP).where(logs.isfinite(), _NONE).long()
    weights = torch.tensor(multiplicities, dtype=torch.float64)
    weights = weights.repeat_interleave(torch.tensor(lengths), output_size=len(bins))
    counts = torch.bincount(bins, weights=weights)[:_NONE]
    return [(_LOW + STEP * i, n) for i, n in enumerate(counts.tolist()) if n > 0]
