"""The columns of a report's table: values of one estimator, and the views that choose them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS
from fimprobe.report.format import count_with_error, number, percent, with_error, without_error
from fimprobe.report.record import Record, error_with_drawn_labels, pairs_needed

VIEWS = ("errors", "variances", "bounds", "all")
"""The choices of columns; the first one is the default."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: a value of one estimator, None where it is unknown."""

    head: str
    key: str
    """The key of the estimator."""
    field: str
    show: Callable[[float | None], str] = number
    error_field: str = ""
    """The field of the standard error that stands behind the value; empty without one."""
    rank: int = 0
    """The column of the highest rank goes first where the space is narrow; 0 stays longest."""

    def value(self, record: Record, group: Record, *, at: int | None = None) -> float | None:
        """Return the value of one row.

        Args:
            record: The record of the report.
            group: The part of the record on a layer, or on the whole model.
            at: Number of inputs of the error with 1 label; None for that of the report.

        Returns:
            The number, in the unit of the field; None where it is unknown.
        """
        estimate = group.get(self.key, {})
        if self.field == "one_label_error":
            return error_with_drawn_labels(estimate, record["batch_size"], at=at)
        if self.field == "pairs_for_10_percent":
            return pairs_needed(estimate)
        value: float | None = estimate.get(self.field)
        return value

    def cell(self, record: Record, group: Record) -> str:
        """Return the text of one row.

        Args:
            record: The record of the report.
            group: The part of the record on a layer, or on the whole model.
        """
        value = self.value(record, group)
        if not self.error_field:
            return self.show(value)
        error = group.get(self.key, {}).get(self.error_field)
        if self.field == "pairs_for_10_percent":
            return count_with_error(value, error)
        if error is None and self.error_field != "std_error":  # an old record may not have it
            return self.show(value)
        return with_error(value, error)

    def brief(self, record: Record, group: Record, *, at: int | None = None) -> str:
        """Return the text of one row without its error, in the digits that the error allows.

        Args:
            record: The record of the report.
            group: The part of the record on a layer, or on the whole model.
            at: Number of inputs of the error with 1 label; None for that of the report.
        """
        if not self.error_field:
            return self.show(self.value(record, group, at=at))
        return without_error(self.cell(record, group))

    def gaps(self, record: Record, group: Record) -> Iterator[tuple[str, str]]:
        """Yield (head, field) of what is unknown in the cell of one row.

        Args:
            record: The record of the report.
            group: The part of the record on a layer, or on the whole model.
        """
        if self.value(record, group) is None:
            yield self.head, self.field
        elif self.error_field == "std_error" and group[self.key].get("std_error") is None:
            yield f"± of {self.head}", "std_error"


def make_columns(record: Record, view: str = "errors") -> list[Column]:
    """Return the columns of a record's table that hold numbers.

    Args:
        record: The record of a report.
        view: One of ``VIEWS``.

    Raises:
        FimprobeError: If there is no such view.
    """
    if view not in VIEWS:
        raise FimprobeError(
            f"`view` must be one of {', '.join(map(repr, VIEWS))}, got {view!r}. Use 'errors' for "
            "the traces and their errors."
        )
    views = VIEWS[:-1] if view == "all" else (view,)
    return [column for name in views for column in _COLUMNS[name] if _is_measured(record, column)]


def _is_measured(record: Record, column: Column) -> bool:
    """Return whether the estimator of a column was measured; bounds must be known somewhere."""
    if column in _COLUMNS["bounds"]:
        groups = [record["total"], *record["layers"].values()]
        return any(column.value(record, group) is not None for group in groups)
    return record["total"].get(column.key) is not None


def _column(name: str, key: str, field: str, rank: int, *, error_field: str = "") -> Column:
    """Return the column of an estimator, headed by the name of its values and the symbol.

    Args:
        name: The name of the values, which a footnote explains.
        key: The key of the estimator.
        field: The field of the estimate.
        rank: The rank of the column.
        error_field: The field of the standard error.
    """
    head = f"{name}: {SYMBOLS[key]}"
    show = percent if field in ("rel_error", "one_label_error") else number
    return Column(head=head, key=key, field=field, show=show, error_field=error_field, rank=rank)


_COLUMNS = {
    "errors": [
        _column("trace F", "i1", "trace", 5, error_field="std_error"),
        _column("trace F", "i2", "trace", 6, error_field="std_error"),
        _column("error", "i1", "rel_error", 0),
        _column("error", "i2", "rel_error", 4),
    ],
    "variances": [
        _column("1 label", "i1", "one_label_error", 1),
        _column("1 label", "i2", "one_label_error", 1),
        _column("pairs for 10 %", "i1", "pairs_for_10_percent", 3, error_field="pairs_error"),
        _column("label variance", "i1", "label_variance", 4, error_field="label_variance_error"),
        _column("label variance", "i2", "label_variance", 5, error_field="label_variance_error"),
        # that of every estimator: F of one input does not depend on a label
        Column(head="input variance", key="i1", field="input_variance", rank=4),
    ],
    "bounds": [
        _column(f"bound/{name}", key, field, 9)
        for key in LAYER_KEYS
        for name, field in {
            "diagonal": "diagonal_tightness",
            "matrix": "trace_tightness",
            "covariance": "tightness",
        }.items()
    ],
}
"""The columns of each view."""

RANKS = {column.head: column.rank for columns in _COLUMNS.values() for column in columns} | {
    "parameters": 7,
    "verdict": 0,
}
"""The rank of each column by its head."""
