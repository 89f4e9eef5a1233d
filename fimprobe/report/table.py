"""The table of a report: a row for each layer, and footnotes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fimprobe.report.columns import RANKS, make_columns
from fimprobe.report.footnotes import footnotes
from fimprobe.report.format import Row, align, one_line
from fimprobe.report.layer_names import fit_labels, label_layers
from fimprobe.report.record import Record, describe_hidden, rank_layers, summary_line, verdict

MIN_NAME_WIDTH = 18
"""Characters of a layer's name that stay in the narrowest table: fewer do not tell layers apart."""


def format_report(
    record: Record, top: int | None = None, *, below: str = "", width: int | None = None
) -> str:
    """Return the summary of a report, its table, footnotes and advice.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most inputs; None for all.
        below: A paragraph below the table; "" for none.
        width: Number of characters of a line; None for any.
    """
    paragraphs = [
        [*wrap([summary_line(record)], width), format_table(record, top, width=width)],
        *[wrap([text], width) for text in (below,) if text],
        wrap(record["advice"], width),
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs)


def format_table(
    record: Record, top: int | None = None, *, view: str = "errors", width: int | None = None
) -> str:
    """Return the table of a report with its footnotes.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most inputs; None for all.
        view: One of ``VIEWS``.
        width: Number of characters of a line; None for any.

    Raises:
        FimprobeError: If there is no such view.
    """
    rows, hidden = fit_rows(make_rows(record, top, view=view), width)
    table = align(rows)
    rule = "-" * max(map(len, table))
    notes = footnotes(record, top, view=view, without=hidden)
    notes += hidden_layers(record, top)
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
    # a number stays on one line with its unit and its error
    joined = [line.replace(" %", "\xa0%").replace(" ± ", "\xa0±\xa0") for line in plain]
    parts = [part for x in joined for part in textwrap.wrap(x, width, subsequent_indent="  ")]
    return [part.replace("\xa0", " ") for part in parts]


def hidden_layers(record: Record, top: int | None) -> list[str]:
    """Return a line on the layers that a table of ``top`` layers does not show, if there are any.

    Args:
        record: The record of a report.
        top: Number of layers in the table; None for all.
    """
    hidden = "" if top is None else describe_hidden(record, top)
    return [f"({hidden}: --top {len(record['layers'])})"] if hidden else []


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
        shown.remove(max(shown[1:], key=lambda i: (RANKS.get(rows[0][i], 1), i)))
    space = max(width - sum(widths[i] + 2 for i in shown[1:]), name_width)
    names = fit_labels([one_line(row[0]) for row in rows], space)
    fitted = [(name, *(row[i] for i in shown[1:])) for name, row in zip(names, rows, strict=True)]
    return fitted, [head for i, head in enumerate(rows[0]) if i not in shown]


def make_rows(record: Record, top: int | None = None, *, view: str = "errors") -> list[Row]:
    """Return the head of the table, a row for each layer and the row of the whole model.

    Args:
        record: The record of a report.
        top: Number of layers, those that need the most inputs; None for all.
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
