"""Tables of Î₁ over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence

from fimprobe.report.format import Row, align, count, number, percent, subsample, trend
from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import Record, error_with_drawn_labels, pairs_needed, rank_layers
from fimprobe.report.table import Column

TRENDS = (
    Column(head="Î₁: 1 label", key="i1", field="one_label_error", show=percent),
    Column(head="trace F", key="i1", field="trace", show=number),
    Column(head="V labels", key="i1", field="label_variance", show=number),
)
"""The values over steps."""


def format_trend(records: Sequence[Record], rows: int = 12) -> str:
    """Return Î₁ of the whole model over a run as lines.

    Args:
        records: The reports of the run.
        rows: Maximum number of reports in the table, evenly spaced.
    """
    table: list[Row] = [("step", "trace F", "rel. error", "Î₁: 1 label", "pairs for 10 %")]
    for record in subsample(records, rows):
        estimate = record["total"]["i1"]
        error = error_with_drawn_labels(estimate, record["batch_size"])
        table.append(
            (
                f"{record['step']:,}",
                number(estimate["trace"]),
                percent(estimate["rel_error"]),
                percent(error),
                count(pairs_needed(estimate)),
            )
        )
    return "\n".join(align([tuple(cell.rjust(8) for cell in row) for row in table]))


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
            values = [None if group is None else column.value(r, group) for r, group in groups]
            cells.append(trend(values, column.show))
        rows.append((labels.get(name, name), *cells))
    return rows


def format_trends(records: Sequence[Record], top: int = 8) -> str:
    """Return the table of trends as lines, with a title.

    Args:
        records: The reports of the run, at least one, in the order of steps.
        top: Number of layers, those that need the most pairs in the last report.
    """
    first, last = records[0]["step"], records[-1]["step"]
    title = f"Î₁ from step {first:,} to {last:,} (a row's bars: from its least to its greatest, log)"
    return "\n".join([title, *align(make_trends(records, top))])
