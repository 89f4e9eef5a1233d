"""V2 = Σ_i E R_ii² of groups of parameters from spot checks, and its standard error.

The checks of a layer are independent estimates of its V2. A layer has too few of them for a spread
of its own: the spread relative to V2 is shared by layers of a kind. The pilot has a fixed weight,
because the number of later checks depends on its values: weights by numbers would pull the sum down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fimprobe.statistics import SpotChecks

PILOT_WEIGHT = 0.15
"""Weight of the pilot's mean in a layer's estimate."""

SHARED_CHECKS = 6.0
"""Number of checks for which the spread of a layer's kind counts in that of the layer."""

PRIOR_SPREAD, PRIOR_CHECKS = 1.2, 4.0
"""Relative standard deviation of a check that is assumed of a kind, and its weight in checks."""

WIDENING = 1.5
"""An error of r times V2 is stated as r (1 + ``WIDENING`` r): ± 2 errors then cover the mean of
log-normal values in 90 % of the cases, for a relative spread of up to 1.3 and 2 to 40 checks after
the pilot (tests/unit/estimators/test_spot_checks.py)."""

ROUNDING_LIMIT = 0.5
"""Share of V2 that may be rounding, above which V2 is unknown."""

MIN_CHECKS_OF_A_PART = 5
"""Checks of one parameter of a layer, below which their spread says nothing."""

FEW_DRAWN = "too few spot checks fell on it for an error; take more inputs, which have more of them"
NONE_DRAWN = "no spot check fell on it; take more inputs, which have more of them"
"""Why V2 of one parameter of a layer is unknown: one or a few checks, or none."""

ALL_ZERO = "every spot check was zero; V2 may be zero, or large at rare entries that none fell on"
"""Why V2 is unknown: zeros show no spread, and an error of zero would claim that they are all."""

ROUNDED = "below the rounding of the model's outputs; a model in float64 would show it"
"""Why V2 is unknown."""


@dataclass(frozen=True, kw_only=True)
class CheckedVariance:
    """V2 of a group of parameters.

    Attributes:
        value: V2, mean over the inputs; None where it is unknown.
        error: Its standard error; 0 where V2 is zero by the graph.
        reason: Why ``value`` is None.
    """

    value: float | None
    error: float = 0.0
    reason: str = ""


def spreads_of_kinds(checks: SpotChecks) -> dict[str, float]:
    """Return the relative variance of single checks by kind of layer.

    Where the checks of all layers together spread more than is assumed, those of a kind with few
    checks may do so unseen: its prior is the larger of the two.
    """
    sums: dict[str, tuple[float, int]] = {}
    for stratum in checks.strata:
        square, freedom = _spread(stratum.values.tolist())
        before = sums.get(stratum.kind, (0.0, 0))
        sums[stratum.kind] = before[0] + square, before[1] + freedom
    prior = PRIOR_SPREAD**2
    freedom = sum(n for _, n in sums.values())
    if freedom > 0:
        prior = max(prior, sum(s for s, _ in sums.values()) / freedom)
    return {
        kind: (PRIOR_CHECKS * prior + square) / (PRIOR_CHECKS + freedom)
        for kind, (square, freedom) in sums.items()
    }


def estimate_v2(
    checks: SpotChecks, names: Sequence[str], spreads: Mapping[str, float] | None = None
) -> CheckedVariance:
    """Return V2 of a group of parameters.

    Args:
        checks: The spot checks of all layers.
        names: The parameters of the group.
        spreads: What :func:`spreads_of_kinds` returns for these checks; None to compute it.
    """
    if checks.failure:
        return CheckedVariance(value=None, reason=checks.failure)
    spreads = spreads_of_kinds(checks) if spreads is None else spreads
    group = set(names)
    value = variance = rounding = 0.0
    num_checks = 0
    for stratum in checks.strata:
        inside = [name in group for name in stratum.parameters]
        if not any(inside):
            continue
        values, share = stratum.values.tolist(), 1.0
        if not all(inside):
            owned = [inside[owner] for owner in stratum.owners.tolist()]
            if sum(owned) < min(MIN_CHECKS_OF_A_PART, len(owned)):
                return CheckedVariance(value=None, reason=FEW_DRAWN if any(owned) else NONE_DRAWN)
            values = [x if own else 0.0 for x, own in zip(values, owned, strict=True)]
            share = sum(owned) / len(owned)
        num_checks += len(values)
        relative = (spreads[stratum.kind] + 1) / share - 1
        mean, square = _mean_and_error(values, stratum.pilot, relative)
        value, variance = value + mean, variance + square
        rounded = zip(values, stratum.rounding.tolist(), strict=True)
        rounding += sum(x * of_value for x, of_value in rounded) / len(values)
    if num_checks and value == 0:
        return CheckedVariance(value=None, reason=ALL_ZERO)
    if value > 0 and rounding > ROUNDING_LIMIT * value:
        return CheckedVariance(value=None, reason=ROUNDED)
    return CheckedVariance(value=value, error=math.sqrt(variance + rounding**2))


def _mean_and_error(values: Sequence[float], num_pilot: int, relative: float) -> tuple[float, float]:
    """The estimate of a layer, or of a part of it, and the square of its standard error.

    Args:
        values: The values of its checks, those of the pilot first; 0 for the checks of other parts.
        num_pilot: Number of checks in the pilot.
        relative: Relative variance of a single check, as it is shared by layers of the kind.
    """
    pilot, main = values[:num_pilot], values[num_pilot:]
    if not main:
        mean, share = sum(pilot) / len(pilot), 1 / len(pilot)
    elif not pilot:
        mean, share = sum(main) / len(main), 1 / len(main)
    else:
        mean = PILOT_WEIGHT * sum(pilot) / len(pilot)
        mean += (1 - PILOT_WEIGHT) * sum(main) / len(main)
        share = PILOT_WEIGHT**2 / len(pilot) + (1 - PILOT_WEIGHT) ** 2 / len(main)
    if mean == 0:
        return mean, 0.0
    shared = relative * mean**2
    freedom = len(values) - 1
    own = sum((x - mean) ** 2 for x in values) / max(freedom, 1)
    variance = (freedom * own + SHARED_CHECKS * shared) / (freedom + SHARED_CHECKS)
    # few skewed values miss what is rare, and the spread seen is small where the mean is
    widening = 1 + WIDENING * math.sqrt(variance * share) / mean
    return mean, variance * share * widening**2


def _spread(values: Sequence[float]) -> tuple[float, int]:
    """Sum of squared relative deviations of checks from their mean, and its degrees of freedom."""
    mean = sum(values) / len(values)
    if len(values) < 2 or mean <= 0:
        return 0.0, 0
    return sum((x / mean - 1) ** 2 for x in values), len(values) - 1
