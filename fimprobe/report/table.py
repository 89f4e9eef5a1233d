"""The table of a report: a row for each layer, and footnotes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS
from fimprobe.report.format import Row, align, count, number, one_line, percent, some
from fimprobe.report.reasons import shared_reason, why_unknown, without_numbers
from fimprobe.report.record import (
    Record,
    describe_inputs,
    describe_labels,
    error_with_drawn_labels,
    format_pairs,
    pairs_needed,
    rank_layers,
    summary_line,
)

OPTIONAL_COLUMNS = (
    f"bound/Cov {SYMBOLS['i2']}",
    f"bound/Cov {SYMBOLS['i1']}",
    f"{SYMBOLS['i2']}: V labels",
    "V inputs",
    "parameters",
    "V labels",
    "± s.e.",
)
"""Columns that are left out where the space is narrow, the first of these first."""

MAX_REASONS = 6
"""Footnotes on unknown values; the record holds all."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: a value of one estimator, None where it is unknown."""

    head: str
    key: str
    """The key of the estimator."""
    field: str
    show: Callable[[float | None], str]

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
        if self.field == "pairs_for_10_percent":
            return format_pairs(group.get(self.key, {}))
        return self.show(self.value(record, group))


def format_table(record: Record, top: int | None = None) -> str:
    """Return the table of a report with its summary, footnotes and advice.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most pairs; None for all.
    """
    table = align(make_rows(record, top))
    rule = "-" * max(map(len, table))
    lines = [table[0], rule, *table[1:-1], rule, table[-1], *footnotes(record, top)]
    lines = [summary_line(record), *lines, "", *record["advice"]]
    return "\n".join(map(one_line, lines))


def footnotes(record: Record, top: int | None = None, *, without: Sequence[str] = ()) -> list[str]:
    """Return the meaning of the errors in the table, and the reasons for its unknown values.

    Args:
        record: The record of a report.
        top: Number of layers in the table; None for all.
        without: Heads of the columns that are not shown.
    """
    return [*error_footnotes(record), *_missing_footnotes(record, top, without)]


def error_footnotes(record: Record) -> list[str]:
    """Return the meaning of the two kinds of errors in the table."""
    return [
        f"rel. error: how far off this report's F is, with {describe_labels(record)}",
        "1 label: how far off an estimator would be with one label from the model for each of "
        f"{describe_inputs(record)}",
        "pairs for 10 %: (input, label) pairs, labels from the model, that Î₁ takes for an error of "
        "10 %",
    ]


def _missing_footnotes(record: Record, top: int | None, without: Sequence[str]) -> list[str]:
    """Return one line for all rows that lack the same columns for the same cause."""
    columns = [column for column in make_columns(record) if column.head not in without]
    rows = [("total", record["total"]), *rank_layers(record, top)]
    # reasons with the same cause differ by the numbers in their brackets
    missing: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for column in columns:
        for name, group in rows:
            if column.value(record, group) is None:
                reason = why_unknown(record, group, column.key, column.field)
                if reason:
                    key = without_numbers(reason), column.head
                    missing.setdefault(key, []).append((name, reason))
    heads_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (cause, head), reasons in missing.items():
        heads_of.setdefault((cause, tuple(name for name, _ in reasons)), []).append(head)
    lines = []
    for (cause, names), heads in list(heads_of.items())[:MAX_REASONS]:
        values = "all numbers" if len(heads) == len(columns) else ", ".join(heads)
        where = "everywhere" if len(names) == len(rows) > 2 else f"in {some(names)}"
        lines.append(f"– {values} {where}: {shared_reason(missing[cause, heads[0]])}")
    more = len(heads_of) - MAX_REASONS
    if more > 0:
        lines.append(f"– {more} more reason{'s' * (more > 1)} in the record, under 'unknown'")
    return lines


def make_columns(record: Record) -> list[Column]:
    """Return the columns of a record's table; ‖Cov‖ is known for exact labels only."""
    groups = [record["total"], *record["layers"].values()]
    has_i2 = record["total"].get("i2") is not None
    i1, i2 = SYMBOLS["i1"], SYMBOLS["i2"]
    columns = [
        Column(head="trace F", key="i1", field="trace", show=number),
        Column(head="± s.e.", key="i1", field="std_error", show=number),
        Column(head="rel. error", key="i1", field="rel_error", show=percent),
        Column(head=f"{i1}: 1 label", key="i1", field="one_label_error", show=percent),
        *[Column(head=f"{i2}: 1 label", key="i2", field="one_label_error", show=percent)] * has_i2,
        Column(head="pairs for 10 %", key="i1", field="pairs_for_10_percent", show=count),
        Column(head="V labels", key="i1", field="label_variance", show=number),
        Column(head="V inputs", key="i1", field="input_variance", show=number),
        *[Column(head=f"{i2}: V labels", key="i2", field="label_variance", show=number)] * has_i2,
    ]
    for key in LAYER_KEYS:
        if any(group.get(key, {}).get("tightness") is not None for group in groups):
            columns.append(
                Column(head=f"bound/Cov {SYMBOLS[key]}", key=key, field="tightness", show=number)
            )
    return columns


def make_rows(record: Record, top: int | None = None) -> list[Row]:
    """Return the head of the table, a row for each layer and the row of the whole model.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most pairs; None for all.
    """
    columns = make_columns(record)
    rows: list[Row] = [("layer", "parameters", *[column.head for column in columns])]
    for name, group in [*rank_layers(record, top), ("total", record["total"])]:
        cells = [column.cell(record, group) for column in columns]
        rows.append((name, f"{group['numel']:,}", *cells))
    return rows
