"""Whether Î₂ says anything beside Î₁, decided from a whole report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fimprobe.report.format import quantity
from fimprobe.report.report import Report

MAX_PAIRS_RATIO = 100.0
"""Pairs of Î₂ for one of Î₁ above which its efficiency is below 1 %."""


def why_i2_says_nothing(report: Report, *, of_layers: bool) -> str:
    """Return why Î₂ of a report informs about nothing; "" if it does, or if it was not measured.

    Args:
        report: A whole report.
        of_layers: Whether the layers decide, and not the model. Spot checks leave small layers with
            few checks by intention.
    """
    i1, i2 = report.total.i1, report.total.i2
    if i2 is None:
        return ""
    layers = [group.i2 for group in report.layers.values() if group.i2 is not None]
    lost = sum(_is_within_noise(vars(estimate)) for estimate in layers)
    if of_layers and layers and 2 * lost > len(layers):
        return f"its label variance is within its noise in {lost} of {quantity(len(layers), 'layer')}"
    if not of_layers and _is_within_noise(vars(i2)):
        return "its label variance is within its noise"
    pairs, pairs_of_i1 = i2.pairs_for(0.1), i1.pairs_for(0.1)
    if pairs is None or not pairs_of_i1 or pairs <= MAX_PAIRS_RATIO * pairs_of_i1:
        return ""
    return f"it needs {pairs / pairs_of_i1:,.0f} times as many (input, label) pairs as Î₁"


def share_of_i2(report: Report) -> float:
    """Return the share of a report's seconds that Î₂ took, below 1."""
    if report.seconds <= 0:
        return 0.0
    return min(report.seconds_by_part.get("i2", 0.0) / report.seconds, 0.99)


def recurring_share(report: Report) -> float:
    """Return the share of the first report's seconds that later ones take, too.

    The first one also copies the model and verifies how its parameters are reached.
    """
    parts = [seconds for name, seconds in report.seconds_by_part.items() if name != "i2 diagonal"]
    return min(sum(parts) / report.seconds, 1.0) if parts and report.seconds > 0 else 1.0


def _is_within_noise(estimate: Mapping[str, Any]) -> bool:
    """Return whether the label variance of an estimate is below twice its standard error."""
    variance, error = estimate["label_variance"], estimate["label_variance_error"]
    if not error:  # exact, or not measured at all, as with one label for each input
        return False
    return variance is None or variance < 2 * error
