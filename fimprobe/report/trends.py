"""Tables of Î₁ over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

from fimprobe.estimators.names import SYMBOLS
from fimprobe.report.columns import Column
from fimprobe.report.footnotes import explain
from fimprobe.report.format import Row, align, percent, subsample, trend, with_error
from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import Record, error_with_drawn_labels, format_pairs, rank_layers
from fimprobe.report.table import fit_rows, hidden_columns, wrap

TRENDS = (
    Column(head="1 label", key="i1", field="one_label_error", show=percent),
    Column(head="trace F", key="i1", field="trace", error_field="std_error"),
    Column(
        head="label variance", key="i1", field="label_variance", error_field="label_variance_error"
    ),
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
                with_error(estimate["trace"], estimate.get("std_error")),
                percent(estimate["rel_error"]),
                percent(error),
                format_pairs(estimate),
            )
        )
    fitted, hidden = fit_rows([tuple(cell.rjust(7) for cell in row) for row in table], width)
    hidden = [head.strip() for head in hidden]
    notes = explain(records[-1], [x for x in ("1 label", "pairs for 10 %") if x not in hidden])
    notes += [f"({hidden_columns(hidden)})"] if hidden else []
    title = f"The whole model by {SYMBOLS['i1']}, step by step"
    return "\n".join([title, *align(fitted), *wrap(notes, width)])


def make_trends(records: Sequence[Record], top: int = 8) -> list[Row]:
    """Return the head of a table of trends, and a row for the model and for each layer.

    Args:
        records: The reports of the run.
        top: Number of layers, those that need the most inputs in the last report.
    """
    rows: list[Row] = [("layer", *[column.head for column in TRENDS])]
    names, labels = [name for name, _ in rank_layers(records[-1], top)], label_layers(records[-1])
    size = records[-1]["batch_size"]
    for name in ("total", *names):
        groups = [(r, r["total"] if name == "total" else r["layers"].get(name)) for r in records]
        cells = []
        for column in TRENDS:
            values = [
                None if group is None else column.value(r, group, at=size) for r, group in groups
            ]
            ends = [
                "–" if group is None else column.brief(r, group, at=size)
                for r, group in (groups[0], groups[-1])
            ]
            cells.append(trend(values, *ends))
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


def format_trends(
    records: Sequence[Record],
    top: int = 8,
    *,
    width: int | None = None,
    explained: Sequence[str] = ("label variance",),
) -> str:
    """Return the table of trends as lines, with a title and the meaning of some columns.

    Args:
        records: The reports of the run, at least one, in the order of steps.
        top: Number of layers, those that need the most inputs in the last report.
        width: Number of characters of a line; None for any.
        explained: Heads of the columns whose meaning is stated, where they are shown.
    """
    rows, hidden = fit_rows(make_trends(records, top), width)
    notes = explain(records[-1], [head for head in explained if head not in hidden])
    notes += [f"({hidden_columns(hidden)})"] if hidden else []
    return "\n".join([*wrap([title_of_trends(records)], width), *align(rows), *wrap(notes, width)])
