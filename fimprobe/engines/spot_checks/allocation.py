"""How many spot checks each layer has, and how a layer's checks are shared by its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fimprobe.engines.spot_checks.proposals import EVEN_PARAMETERS
from fimprobe.engines.tracing.spot_history import SpotHistory

PILOT = 2
"""Checks of each layer in the pilot: the least that show a spread."""

SLOTS_PER_INPUT = 6
"""Most checks for each input of the batch, the pilot included; see docs/performance.md."""

SLOTS_PER_LAYER = 4
"""Checks for each layer on average that are allowed in any case."""

SLOTS_OF_SMALL_MODELS, SMALL_ENTRIES = 256, 2**23
"""Checks that are made in any case, if they times the number of parameters are at most the latter.

A pass of a small model costs its calls, whatever the number of rows. Its inputs and entries differ
more than those of a large one: in a network of 5 layers with weights of size 1/2 one of 12 inputs
held 73 % of V2 of a layer, and 30 checks often missed it.
"""

LARGE_SHARE = 0.01
"""Share of V2, as far as it is known, from which a layer's error counts for itself."""

TOTAL_ERROR, LAYER_ERROR = 0.1, 0.2
"""Relative errors of the total and of each large layer that are aimed at."""

MARGIN = 1.2
"""Factor on the number of checks, since the stated error is wider than the spread."""

PRIOR_SPREAD, PRIOR_WEIGHT = 0.9, 2.0
"""Relative standard deviation of a single check that is assumed, and its weight in checks."""

GUESS_WEIGHT = 2.0
"""Weight of the first guess of a layer's shares, in checks."""


def relative_variances(history: SpotHistory, kinds: Mapping[str, str]) -> dict[str, float]:
    """Return the relative variance of single checks of each layer, shared by layers of a kind.

    Args:
        history: The spreads that are known.
        kinds: Kind of each layer.
    """
    variances = {}
    for layer, kind in kinds.items():
        square, freedom = history.spreads.get(kind, (0.0, 0.0))
        square += PRIOR_WEIGHT * PRIOR_SPREAD**2
        variances[layer] = square / (freedom + PRIOR_WEIGHT)
    return variances


def num_checks_at_least(num_parameters: int) -> int:
    """Return the number of checks that a model of so many parameters has in any case."""
    return min(SLOTS_OF_SMALL_MODELS, SMALL_ENTRIES // max(num_parameters, 1))


def allot(
    means: Mapping[str, float], variances: Mapping[str, float], limit: int, least: int = 0
) -> dict[str, int]:
    """Return the number of checks of each layer.

    The sum's error is least if checks are in proportion to V2 times their spread (Neyman's rule). A
    large layer needs a number of its own. Each layer has the larger of the two demands; together they
    are cut to the limit.

    Args:
        means: V2 of each layer, as far as it is known.
        variances: Relative variance of single checks.
        limit: Largest number of checks; each layer has at least one.
        least: Smallest number of checks, if more are not needed.
    """
    whole = sum(means.values())
    if whole <= 0:
        even = max(1, limit // max(1, len(means)))
        return dict.fromkeys(means, even)
    noise = {layer: means[layer] / whole * math.sqrt(variances[layer]) for layer in means}
    scale = MARGIN * sum(noise.values()) / TOTAL_ERROR**2
    demands = {}
    for layer, share in noise.items():
        large = means[layer] >= LARGE_SHARE * whole
        demand = MARGIN * variances[layer] / LAYER_ERROR**2 if large else 0.0
        demands[layer] = max(share * scale, demand)
    needed = max(sum(demands.values()), 1e-300)
    room = max(min(max(needed, least), limit) - len(means), 0) / needed
    return {layer: 1 + round(room * demand) for layer, demand in demands.items()}


def learned_shares(
    guess: Mapping[str, float], values: Mapping[str, float], num_checks: float
) -> dict[str, float]:
    """Return the probability of each parameter of a layer.

    Args:
        guess: Probabilities from first derivatives.
        values: V2 of the parameters, as far as it is known.
        num_checks: Number of checks behind these values.
    """
    known = [max(values.get(name, 0.0), 0.0) for name in guess]
    whole = sum(known)
    if not 0 < whole < math.inf:
        return dict(guess)
    weight = GUESS_WEIGHT + num_checks
    shares = {}
    for (name, guessed), value in zip(guess.items(), known, strict=True):
        share = (GUESS_WEIGHT * guessed + num_checks * value / whole) / weight
        shares[name] = (1 - EVEN_PARAMETERS) * share + EVEN_PARAMETERS / len(guess)
    return shares
