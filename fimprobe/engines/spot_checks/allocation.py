"""How many spot checks each layer has: few in a pilot, then where the noise is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PILOT = 2
"""Checks of each layer in the pilot: the least that show a spread."""

SLOTS_PER_INPUT = 6
"""Checks for each input of the batch, the pilot included; see docs/performance.md for their error."""

SLOTS_PER_LAYER = 4
"""Least number of checks for each layer, on average."""

LARGE_SHARE = 0.005
"""Share of V2, by the pilot, from which a layer's error counts for itself."""

TOTAL_ERROR, LAYER_ERROR = 0.1, 0.2
"""Relative errors of the total and of each large layer that are aimed at; their ratio matters."""

PRIOR_SPREAD, PRIOR_WEIGHT = 0.9, 4.0
"""Relative standard deviation of a single check that is assumed, and its weight in checks."""


def relative_variances(
    values: Mapping[str, Sequence[float]], kinds: Mapping[str, str]
) -> dict[str, float]:
    """Return the relative variance of single checks of each layer, shared by layers of a kind.

    Args:
        values: Values of the pilot's checks by layer.
        kinds: Kind of each layer.
    """
    totals: dict[str, list[float]] = {}
    for layer, of_layer in values.items():
        mean, count = sum(of_layer) / len(of_layer), len(of_layer)
        square, freedom = totals.setdefault(kinds[layer], [0.0, 0.0])
        if mean > 0 and count > 1:
            spread = sum((x / mean - 1) ** 2 for x in of_layer)
            # two values differ from their mean at most by it: the ratio is too small by about this
            square, freedom = square + spread * count / (count - 1), freedom + count - 1
        totals[kinds[layer]] = [square, freedom]
    prior = PRIOR_SPREAD**2
    return {
        layer: (totals[kind][0] + PRIOR_WEIGHT * prior) / (totals[kind][1] + PRIOR_WEIGHT)
        for layer, kind in kinds.items()
    }


def allot(means: Mapping[str, float], variances: Mapping[str, float], total: int) -> dict[str, int]:
    """Return the number of checks of each layer after the pilot.

    The sum's error is least if checks are in proportion to V2 times their spread (Neyman's rule). A
    large layer needs a number of its own. The larger of the two demands is scaled to the total.

    Args:
        means: V2 of each layer by the pilot.
        variances: Relative variance of single checks.
        total: Number of checks to distribute; each layer has at least one.
    """
    whole = sum(means.values())
    if whole <= 0:
        even = max(1, total // max(1, len(means)))
        return dict.fromkeys(means, even)
    noise = {layer: means[layer] / whole * math.sqrt(variances[layer]) for layer in means}
    scale = sum(noise.values()) / TOTAL_ERROR**2
    demands = {}
    for layer, share in noise.items():
        large = means[layer] >= LARGE_SHARE * whole
        demand = variances[layer] / LAYER_ERROR**2 if large else 0.0
        demands[layer] = max(share * scale, demand)
    room = max(total - len(means), 0) / max(sum(demands.values()), 1e-300)
    return {layer: 1 + round(room * demand) for layer, demand in demands.items()}
