"""The estimator with the smallest error at equal compute, from errors and measured times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fimprobe.estimators.estimate import GroupEstimates
from fimprobe.estimators.names import SYMBOLS, UNBIASED_KEYS
from fimprobe.report.format import factor, listed, some

if TYPE_CHECKING:
    from fimprobe.report.report import Report

MIN_GAIN = 1.1
"""Errors whose ratio is smaller are called similar."""

MAX_NAMES = 8
"""Layers in a sentence."""


def diagonal_costs(report: Report) -> dict[str, float]:
    """Return the seconds that this measurement spent on the diagonal of each estimator.

    All estimators share the forward pass. Î₂ = F − R also needs F, from Hutchinson's vectors, or from
    the passes of Î₁ where labels are exact.
    """
    seconds = report.seconds_by_part
    fisher = "i1" if report.draws is None else "ggn" if "ggn" in seconds else "ih"
    parts_of = {"i1": ["i1"], "i2": [fisher, "i2 diagonal"], "ih": ["ih"]}
    return {
        key: sum(seconds[part] for part in ("forward", *parts))
        for key, parts in parts_of.items()
        if {"forward", *parts} <= set(seconds)
    }


def best_estimator(group: GroupEstimates, costs: dict[str, float]) -> tuple[str, float] | None:
    """Return the estimator with the smallest error at equal compute, and its gain.

    Errors are proportional to √(variance of a pair × its cost).

    Args:
        group: The estimates of one group of parameters.
        costs: Seconds for the diagonal of each estimator.

    Returns:
        (key, error of the second best estimator over the error of the best); None where fewer than
        two variances are known, where all are zero, or where a change of the variances by two
        standard errors would change the choice.
    """
    low, high = {}, {}
    for key, cost in costs.items():
        estimate = group.get(key)
        pairs = None if estimate is None else estimate.pairs_for(1.0)
        if estimate is None or pairs is None:
            continue
        noise = 2 * (estimate.pairs_error or 0.0)
        if key != "i2" and group.i2 is not None:
            # the noise of the variance over inputs changes all estimators alike: counted once
            noise = 0.0
        low[key] = (max(1 - noise, 0.0) * pairs * cost) ** 0.5
        high[key] = ((1 + noise) * pairs * cost) ** 0.5
    if len(low) < 2 or not any(high.values()):
        return None
    best = min(high, key=lambda key: high[key])
    second = min(low[key] for key in low if key != best)
    if second < high[best]:
        return None
    if second == 0:
        return best, 1.0
    return best, second / high[best] if high[best] > 0 else math.inf


def choice_sentences(report: Report) -> list[str]:
    """Return which estimator has the smallest error in each layer at equal compute."""
    if not report.total.i1.norm:
        return []
    return [*_compare_errors(report), *_name_silent_layers(report)]


_BASIS = "At equal compute and one drawn label for each input"


def _compare_errors(report: Report) -> list[str]:
    costs = diagonal_costs(report)
    if len(costs) < 2:
        return []
    wins: dict[str, list[str]] = {key: [] for key in ("i2", "ih", "i1")}
    known = False
    for name, group in report.layers.items():
        choice = best_estimator(group, costs)
        known = known or choice is not None
        if choice is not None and choice[1] >= MIN_GAIN:
            best, gain = choice
            size = "zero error" if gain == math.inf else f"at least {factor(gain)} times smaller"
            wins[best].append(f"{name!r} ({size})")
    if not known:
        return []
    others: list[str] = [
        key for key in UNBIASED_KEYS[1:] if key in costs and report.total.get(key) is not None
    ]
    costs_sentence = _describe_costs(costs, others)
    winners = {key: names for key, names in wins.items() if names}
    if not winners:
        symbols = listed([SYMBOLS["i1"], *(SYMBOLS[key] for key in others)])
        return [f"{_BASIS}, {symbols} have similar errors. {costs_sentence}"]
    degree = "smaller" if len(others) == 1 else "smallest"
    clauses: list[str] = []
    for key, names in winners.items():
        verb = "" if clauses else f"has the {degree} error "
        clauses.append(f"{SYMBOLS[key]} {verb}{_in_layers(names)}")
    reference = "" if len(others) == 1 else " The factors compare with the second best."
    return [f"{_BASIS}, {'; '.join(clauses)}.{reference} {costs_sentence}"]


def _in_layers(names: list[str]) -> str:
    places = listed(names) if len(names) <= MAX_NAMES else some(names, MAX_NAMES)
    return f"in layer{'s' * (len(names) > 1)} {places}"


def _describe_costs(costs: dict[str, float], others: list[str]) -> str:
    """Return the measured costs of the ``others`` in units of the cost of Î₁."""
    times = [f"{_times(costs[key] / costs['i1'])} as long by {SYMBOLS[key]}" for key in others]
    return f"Measured here, the diagonal takes {listed(times)} as by {SYMBOLS['i1']}."


def _times(ratio: float) -> str:
    """Return a ratio as "4 times", or "about" where it rounds to one."""
    return "about" if factor(ratio) == "1" else f"{factor(ratio)} times"


def _name_silent_layers(report: Report) -> list[str]:
    """Return the layers in which labels add no variance to Î₂."""
    silent: dict[bool, list[str]] = {True: [], False: []}
    for name, group in report.layers.items():
        if group.i2 is not None and group.i2.label_variance == 0 and group.i1.norm:
            silent[group.i2.pairs_for(1.0) is not None].append(repr(name))
    ends = {
        True: ", only that from inputs",
        False: ": its error with 1 label is that from the choice of inputs, and is unknown here",
    }
    return [
        f"The diagonal of Î₂ in {some(names, MAX_NAMES)} has no variance from labels{ends[known]}."
        for known, names in silent.items()
        if names
    ]
