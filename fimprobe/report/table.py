"""The table of a report: a row for each layer, and footnotes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS
from fimprobe.report.format import (
    Row,
    align,
    count_with_error,
    number,
    one_line,
    percent,
    some,
    with_error,
)
from fimprobe.report.layer_names import cut, label_layers
from fimprobe.report.reasons import shared_reason, why_unknown, without_numbers
from fimprobe.report.record import (
    Record,
    describe_inputs,
    describe_labels,
    error_with_drawn_labels,
    pairs_needed,
    rank_layers,
    summary_line,
    verdict,
)

VIEWS = ("errors", "variances", "bounds", "all")
"""The choices of columns; the first one is the default."""

MAX_REASONS = 6
"""Footnotes on unknown values; the record holds all."""

MIN_NAME_WIDTH = 18
"""Characters of a layer's name that stay in the narrowest table: fewer do not tell layers apart."""


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

    def value(self, record: Record, group: Record) -> float | None:
        """Return the value of one row.

        Args:
            record: The record of the report.
            group: The part of the record on a layer, or on the whole model.

        Returns:
            The number, in the unit of the field; None where it is unknown.
        """
        estimate = group.get(self.key, {})
        if self.field == "one_label_error":
            return error_with_drawn_labels(estimate, record["batch_size"])
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


def format_report(record: Record, top: int | None = None, *, width: int | None = None) -> str:
    """Return the summary of a report, its table, footnotes and advice.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most pairs; None for all.
        width: Number of characters of a line; None for any.
    """
    advice = wrap(record["advice"], width)
    return "\n".join(
        [*wrap([summary_line(record)], width), format_table(record, top, width=width), "", *advice]
    )


def format_table(
    record: Record, top: int | None = None, *, view: str = "errors", width: int | None = None
) -> str:
    """Return the table of a report with its footnotes.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most pairs; None for all.
        view: One of ``VIEWS``.
        width: Number of characters of a line; None for any.

    Raises:
        FimprobeError: If there is no such view.
    """
    rows, hidden = fit_rows(make_rows(record, top, view=view), width)
    table = align(rows)
    rule = "-" * max(map(len, table))
    notes = footnotes(record, top, view=view, without=hidden)
    if hidden:
        notes.append(f"({hidden_columns(hidden)})")
    return "\n".join([table[0], rule, *table[1:-1], rule, table[-1], *wrap(notes, width)])


def wrap(lines: Sequence[str], width: int | None) -> list[str]:
    """Return lines of plain text that are broken between words.

    Args:
        lines: The lines.
        width: Number of characters of a line; None for any.
    """
    plain = map(one_line, lines)
    if width is None:
        return list(plain)
    return [part for line in plain for part in textwrap.wrap(line, width, subsequent_indent="  ")]


def hidden_columns(heads: Sequence[str]) -> str:
    """Return a sentence on the columns for which there is no space."""
    return f"a wider terminal also shows {', '.join(heads)}"


def fit_rows(rows: list[Row], width: int | None) -> tuple[list[Row], list[str]]:
    """Return the columns of a table that fit into a width; no number is ever cut.

    Names of layers are cut first, then whole columns are left out, those of the highest rank first.

    Args:
        rows: The head of the table and its rows.
        width: Number of characters of a line; None for any.

    Returns:
        The rows, and the heads of the columns that are left out.
    """
    if width is None:
        return rows, []
    widths = [max(map(len, map(one_line, column))) for column in zip(*rows, strict=True)]
    shown, name_width = list(range(len(widths))), min(widths[0], MIN_NAME_WIDTH)
    while len(shown) > 2 and name_width + sum(widths[i] + 2 for i in shown[1:]) > width:
        shown.remove(max(shown[1:], key=lambda i: (_RANKS.get(rows[0][i], 1), i)))
    space = max(width - sum(widths[i] + 2 for i in shown[1:]), name_width)
    fitted = [(cut(one_line(row[0]), space), *(row[i] for i in shown[1:])) for row in rows]
    return fitted, [head for i, head in enumerate(rows[0]) if i not in shown]


def footnotes(
    record: Record, top: int | None = None, *, view: str = "errors", without: Sequence[str] = ()
) -> list[str]:
    """Return the meaning of the columns, and the reasons for unknown values.

    Args:
        record: The record of a report.
        top: Number of layers in the table; None for all.
        view: One of ``VIEWS``.
        without: Heads of the columns that are not shown.
    """
    columns = [c for c in make_columns(record, view) if c.head not in without]
    notes = [_meanings(record)[name] for name in _named(columns, view)]
    if not columns:
        notes.append("No bound was measured: pass bounds=True, and inputs enough for a variance.")
    notes += _missing_footnotes(record, columns, top)
    return notes


def _named(columns: Sequence[Column], view: str) -> list[str]:
    """Return the names of the meanings that a table needs."""
    heads = " ".join(column.head for column in columns)
    names = [name for name in ("rel. error", "1 label", "pairs for 10 %", "bound/") if name in heads]
    return [*names, *(["verdict"] if view in ("errors", "all") else [])]


def _meanings(record: Record) -> dict[str, str]:
    inputs = describe_inputs(record)
    return {
        "rel. error": "rel. error: the error of this report, how far off its F is with "
        f"{describe_labels(record)}",
        "1 label": "1 label: the error of an estimator, how far off it would be with one label from "
        f"the model for each of {inputs}",
        "pairs for 10 %": "pairs for 10 %: (input, label) pairs, labels from the model, that Î₁ "
        "takes for an error of 10 %",
        "bound/": "bound/...: how loose a bound is, 1 is equality: on V labels, on L (the label "
        "variance of the whole matrix), on ‖Cov‖ (exact labels)",
        "verdict": "verdict: F is trusted up to a rel. error of 10 %, or how many inputs that takes",
    }


def _missing_footnotes(record: Record, columns: list[Column], top: int | None) -> list[str]:
    """Return one line for all rows that lack the same columns for the same cause."""
    labels = label_layers(record)
    rows = [("total", record["total"])]
    rows += [(labels[name], group) for name, group in rank_layers(record, top)]
    # reasons with the same cause differ by the numbers in their brackets
    missing: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for column in columns:
        for name, group in rows:
            for head, field in column.gaps(record, group):
                reason = why_unknown(record, group, column.key, field)
                if reason:
                    missing.setdefault((without_numbers(reason), head), []).append((name, reason))
    heads_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (cause, head), reasons in missing.items():
        heads_of.setdefault((cause, tuple(name for name, _ in reasons)), []).append(head)
    lines = []
    for (cause, names), heads in list(heads_of.items())[:MAX_REASONS]:
        values = "all numbers" if set(heads) == {c.head for c in columns} else ", ".join(heads)
        where = "everywhere" if len(names) == len(rows) > 2 else f"in {some(names)}"
        lines.append(f"– {values} {where}: {shared_reason(missing[cause, heads[0]])}")
    more = len(heads_of) - MAX_REASONS
    if more > 0:
        lines.append(f"– {more} more reason{'s' * (more > 1)} in the record, under 'unknown'")
    return lines


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


def make_rows(record: Record, top: int | None = None, *, view: str = "errors") -> list[Row]:
    """Return the head of the table, a row for each layer and the row of the whole model.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most pairs; None for all.
        view: One of ``VIEWS``.

    Raises:
        FimprobeError: If there is no such view.
    """
    columns, labels = make_columns(record, view), label_layers(record)
    rated = view in ("errors", "all")
    head = ("layer", "parameters") if rated else ("layer",)
    rows: list[Row] = [(*head, *[column.head for column in columns], *["verdict"] * rated)]
    for name, group in [*rank_layers(record, top), ("total", record["total"])]:
        cells = [column.cell(record, group) for column in columns]
        if rated:
            cells = [f"{group['numel']:,}", *cells, verdict(group["i1"], record["batch_size"])]
        rows.append((labels.get(name, name), *cells))
    return rows


def _trace(key: str, rank: int) -> Column:
    head = f"trace F: {SYMBOLS[key]}"
    return Column(head=head, key=key, field="trace", error_field="std_error", rank=rank)


def _label_variance(head: str, key: str, rank: int) -> Column:
    field, error_field = "label_variance", "label_variance_error"
    return Column(head=head, key=key, field=field, error_field=error_field, rank=rank)


def _bound(key: str) -> list[Column]:
    fields = {
        "bound/V labels": "diagonal_tightness",
        "bound/L": "trace_tightness",
        "bound/Cov": "tightness",
    }
    return [
        Column(head=f"{SYMBOLS[key]}: {head}", key=key, field=field, rank=9)
        for head, field in fields.items()
    ]


_COLUMNS = {
    "errors": [
        _trace("i1", 0),
        _trace("i2", 5),
        Column(head="rel. error", key="i1", field="rel_error", show=percent),
        Column(
            head="pairs for 10 %", key="i1", field="pairs_for_10_percent", error_field="pairs_error",
            rank=6,
        ),
    ],
    "variances": [
        Column(head="Î₁: 1 label", key="i1", field="one_label_error", show=percent, rank=1),
        Column(head="Î₂: 1 label", key="i2", field="one_label_error", show=percent, rank=1),
        _label_variance("V labels", "i1", 4),
        Column(head="V inputs", key="i1", field="input_variance", rank=4),
        _label_variance("Î₂: V labels", "i2", 5),
    ],
    "bounds": [column for key in LAYER_KEYS for column in _bound(key)],
}  # fmt: skip
"""The columns of each view."""

_RANKS = {column.head: column.rank for columns in _COLUMNS.values() for column in columns} | {
    "parameters": 7,
    "verdict": 0,
}
