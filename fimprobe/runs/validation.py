"""Whether a line of a file is a record that tables, figures and pages can show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from fimprobe.estimators.names import RECORD_KEYS

MAX_INTEGER = 2**63
"""Greater whole numbers are damage: no step and no count reaches 64 bits."""


def parse_line(line: str) -> Any:
    """Return the contents of a line; None in place of NaN and of infinities.

    Raises:
        ValueError: If it is not JSON, is nested too deeply or has a number of too many digits.
    """
    try:
        return json.loads(line, parse_constant=lambda _: None, parse_float=_parse_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_report(record: Any) -> bool:
    """Return whether a record has what every version of fimprobe writes of a report."""
    return (
        isinstance(record, dict)
        and _is_count(record.get("step"))
        and _is_count(record.get("batch_size"))
        and record["batch_size"] > 0
        and (record.get("draws") == "exact" or _is_count(record.get("draws")))
        and _is_number(record.get("seconds"))
        and record.get("seconds") is not None
        and isinstance(record.get("likelihood"), str)
        and _are_texts(record.get("advice"))
        and _is_group(record.get("total"), needs_i1=True)
        and _are_groups(record.get("layers"), needs_i1=True)
        and _are_groups(record.get("parameters", {}), needs_i1=False)
        and _has_valid_details(record)
    )


def is_run(record: Any) -> bool:
    """Return whether a record is the description of a run."""
    texts = ("fimprobe", "torch", "python", "began", "model", "dtype", "device")
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(name), str) for name in (*texts, "likelihood", "decision"))
        and all(_is_count(record.get(name)) for name in ("first_step", "parameters", "trainable"))
        and _is_count(record.get("processes"))
        and isinstance(record.get("config"), dict)
    )


def _has_valid_details(record: dict[str, Any]) -> bool:
    """Return whether the fields are valid that older versions do not have."""
    outputs = record.get("outputs") or {}
    coverage = record.get("coverage", {})
    return (
        isinstance(outputs, dict)
        and all(map(_is_number, outputs.values()))
        and isinstance(coverage, dict)
        and _are_texts(list(coverage.values()))
        and _are_texts(record.get("kinks", []))
        and _are_texts(record.get("notes", []))
        and _are_pairs(record.get("sizes") or [])
        and _are_pairs(record.get("convergence") or [])
        and (record.get("label_sampling") is None or isinstance(record["label_sampling"], str))
        and _is_number(record.get("seen_mass"))
    )


def _are_groups(groups: Any, *, needs_i1: bool) -> bool:
    return isinstance(groups, dict) and all(
        _is_group(group, needs_i1=needs_i1) for group in groups.values()
    )


def _is_group(group: Any, *, needs_i1: bool) -> bool:
    """Return whether a part of a report, on the model, a layer or a parameter, is valid.

    Args:
        group: The part.
        needs_i1: Whether Î₁ is always measured in it.
    """
    if not isinstance(group, dict) or not _is_count(group.get("numel")):
        return False
    i1 = group.get("i1")
    if needs_i1 and not (isinstance(i1, dict) and {"trace", "std_error", "rel_error"} <= set(i1)):
        return False
    return all(_is_estimate(group[key]) for key in RECORD_KEYS if key in group)


def _is_estimate(estimate: Any) -> bool:
    """Return whether an estimate has numbers, and texts and ranges where these belong."""
    return isinstance(estimate, dict) and all(
        _OTHER_FIELDS.get(name, _is_number)(value) for name, value in estimate.items()
    )


def _is_reasons(value: Any) -> bool:
    return isinstance(value, dict) and _are_texts(list(value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(x is not None and _is_number(x) for x in pair)
        for pair in value
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_INTEGER


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or None: unknown."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < MAX_INTEGER)


def _is_range(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_number, value)))


_OTHER_FIELDS: dict[str, Callable[[Any], bool]] = {
    "unknown": _is_reasons,
    "reason": lambda value: isinstance(value, str),
    "trace_range": _is_range,
}
"""The fields of an estimate that are not numbers, and how each is checked."""


def _parse_float(text: str) -> float | None:
    """Return a number, None where it leaves float64's range."""
    value = float(text)
    return value if math.isfinite(value) else None
