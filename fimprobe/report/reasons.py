"""Reasons for unknown values, with their remedies, shared by the rows and sentences they concern."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fimprobe.report.record import Record

_IN_BRACKETS = r" \(([^()]*)\)"

_FIELDS_OF_COLUMN = {
    "one_label_error": ("pairs",),
    "pairs_for_10_percent": ("pairs",),
    "rel_error": ("rel_error", "norm"),
    "tightness": ("covariance_norm", "bound"),
    "trace_tightness": ("total_label_variance", "trace_bound"),
    "diagonal_tightness": ("label_variance", "diagonal_bound"),
}
"""The keys of ``Estimate.unknown`` that explain a column, the first one before the others."""


def why_unknown(record: Record, group: Record, key: str, field: str) -> str:
    """Return why a value of the table is None, with the remedy; empty where no reason is known.

    Args:
        record: The record of a report.
        group: The record of one of its layers, or of the total.
        key: The key of the estimator.
        field: The field of the estimate, as in a ``Column``.

    >>> record = {"draws": 2, "batch_size": 8}
    >>> group = {"i1": {"unknown": {"label_variance": "lost in its noise (1 ± 2)"}}}
    >>> why_unknown(record, group, "i1", "label_variance")
    "lost in its noise (1 ± 2); take more inputs, or draws='exact'"
    """
    estimate = group.get(key, {})
    unknown = estimate.get("unknown", {})
    names = _FIELDS_OF_COLUMN.get(field, (field,))
    reason: str = next((unknown[name] for name in names if name in unknown), "")
    if reason:
        return _with_remedy(reason, record, key, estimate)
    if "unknown" not in estimate or field in ("trace", "std_error", "rel_error"):
        return ""
    if field.endswith("tightness"):
        none = estimate.get(names[0]) == 0
        return "labels add no covariance that a bound could be compared with" if none else ""
    if record["draws"] == 1:
        return "one label for each input does not determine it; take draws=2 or more"
    return "one input does not determine it; take more" if record["batch_size"] == 1 else ""


def _with_remedy(reason: str, record: Record, key: str, estimate: Record) -> str:
    """Return a reason with the remedy for noise, where it has no remedy yet."""
    if ";" in reason or "noise" not in reason:
        return reason
    if "random probes" in reason:
        return f"{reason}; take second_order={{'probes': ...}} with more of them"
    if key == "i2" and estimate.get("probe_error"):
        return f"{reason}; take more inputs, or second_order={{'probes': ...}}"
    exact_labels = "" if record["draws"] == "exact" else ", or draws='exact'"
    return f"{reason}; take more inputs{exact_labels}"


def without_numbers(reason: str) -> str:
    """Return a reason without its brackets: equal reasons have the same cause.

    >>> without_numbers("too few (2 of 8); take more")
    'too few; take more'
    """
    return re.sub(_IN_BRACKETS, "", reason)


def group_by_cause(reasons: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return (name, reason) pairs in lists with the same cause, in the order of the first of each.

    >>> group_by_cause([("a", "few (1)"), ("b", "lost"), ("c", "few (2)")])
    [[('a', 'few (1)'), ('c', 'few (2)')], [('b', 'lost')]]
    """
    causes: dict[str, list[tuple[str, str]]] = {}
    for name, reason in reasons:
        causes.setdefault(without_numbers(reason), []).append((name, reason))
    return list(causes.values())


def shared_reason(reasons: Sequence[tuple[str, str]]) -> str:
    """Return the common reason of (name, reason) pairs with one cause, with the first one's numbers.

    >>> shared_reason([("fc", "too few (2 of 8); take more"), ("out", "too few (3 of 8); take more")])
    'too few (2 of 8 in fc); take more'
    """
    (name, reason), *others = reasons
    if all(other == reason for _, other in others):
        return reason
    return re.sub(_IN_BRACKETS, lambda match: f" ({match[1]} in {name})", reason, count=1)
