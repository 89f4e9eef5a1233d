"""Tables of Î₁ over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

from fimprobe.estimators.names import SYMBOLS
from fimprobe.report.columns import Column
from fimprobe.report.footnotes import explain
from fimprobe.report.format import Row, align, count, number, percent, subsample, trend
from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import Record, error_with_drawn_labels, pairs_needed, rank_layers
from fimprobe.report.table import fit_rows, hidden_columns, wrap

TRENDS = (
    Column(head="1 label", key="i1", field="one_label_error", show=percent),
    Column(head="trace F", key="i1", field="trace", show=number),
    Column(head="label variance", key="i1", field="label_variance", show=number),
)
"""The values over steps."""


def format_trend(records: Sequence[Record], rows: int = 12, *, width: int | None = None) -> str:
    """Return Î₁ of the whole model over a run as lines, with a title and the meaning of the columns.

    Args:
        records: The reports of the run.
        rows: Maximum number of reports in the table, evenly spaced.
        width: Number of characters of a line; None for any.
    """
    size = records[-1]["batch_size"]
    varied = any(record["batch_size"] != size for record in records)
    inputs = ("inputs",) if varied else ()
    table: list[Row] = [("step", *inputs, "trace F", "error", "1 label", "pairs for 10 %")]
    for record in subsample(records, rows):
        estimate = record["total"]["i1"]
        error = error_with_drawn_labels(estimate, record["batch_size"], at=size)
        table.append(
            (
                f"{record['step']:,}",
                *([f"{record['batch_size']:,}"] if varied else []),
                number(estimate["trace"]),
                percent(estimate["rel_error"]),
                percent(error),
                count(pairs_needed(estimate)),
            )
        )
    fitted, hidden = fit_rows([tuple(cell.rjust(7) for cell in row) for row in table], width)
    lines = [*align(fitted), *([f"({hidden_columns(hidden)})"] if hidden else [])]
    notes = explain(records[-1], ("1 label", "pairs for 10 %"))
    title = f"The whole model by {SYMBOLS['i1']}, step by step"
    return "\n".join([title, *lines, *wrap(notes, width)])


def make_trends(records: Sequence[Record], top: int = 8) -> list[Row]:
    """Return the head of a table of trends, and a row for the model and for each layer.

    Args:
        records: The reports of the run.
        top: Number of layers, those that need the most pairs in the last report.
    """
    rows: list[Row] = [("layer", *[column.head for column in TRENDS])]
    names, labels = [name for name, _ in rank_layers(records[-1], top)], label_layers(records[-1])
    for name in ("total", *names):
        groups = [(r, r["total"] if name == "total" else r["layers"].get(name)) for r in records]
        cells = []
        for column in TRENDS:
            values = [
                None if group is None else column.value(r, group, at=records[-1]["batch_size"])
                for r, group in groups
            ]
            cells.append(trend(values, column.show))
        rows.append((labels.get(name, name), *cells))
    return rows


def title_of_trends(records: Sequence[Record]) -> str:
    """Return the title of the table of trends, which says how to read its bars."""
    steps = f"step {records[0]['step']:,} to {records[-1]['step']:,}"
    return (
        f"Each layer by {SYMBOLS['i1']}, {steps}: the first value, a bar for each report (a blank "
        "where it is unknown), the last value. Bars are logarithmic, from the least value of a row "
        "to its greatest."
    )


def format_trends(records: Sequence[Record], top: int = 8, *, width: int | None = None) -> str:
    """Return the table of trends as lines, with a title.

    Args:
        records: The reports of the run, at least one, in the order of steps.
        top: Number of layers, those that need the most pairs in the last report.
        width: Number of characters of a line; None for any.
    """
    rows, hidden = fit_rows(make_trends(records, top), width)
    notes = [f"({hidden_columns(hidden)})"] if hidden else []
    return "\n".join([*wrap([title_of_trends(records)], width), *align(rows), *wrap(notes, width)])
