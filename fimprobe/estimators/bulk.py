"""Records by the thousand: a deep model has several for each of its parameters."""

from __future__ import annotations

from typing import Any, TypeVar

Frozen = TypeVar("Frozen")


def record_of(kind: type[Frozen], values: dict[str, Any]) -> Frozen:
    """Return a frozen dataclass from the values of all its fields: the constructor takes much longer.

    Args:
        kind: The class, without slots and without ``__post_init__``.
        values: The value of every field, in the order of the fields; the record keeps the dictionary.

    >>> from fimprobe.estimators.estimate import OutputSummary
    >>> values = {"fisher_trace": 1.0, "fisher_norm": None, "moment_norm": None}
    >>> record_of(OutputSummary, values) == OutputSummary(fisher_trace=1.0)
    True
    """
    record = object.__new__(kind)
    object.__setattr__(record, "__dict__", values)
    return record
