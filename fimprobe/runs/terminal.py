"""Runs in the terminal: tables by ``rich`` where it is installed, else plain lines."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.report.comparison import find_differences, make_comparison
from fimprobe.report.format import Row, align, one_line, percent
from fimprobe.report.record import error_with_drawn_labels, summary_line
from fimprobe.report.run_info import differing_settings, format_run_info
from fimprobe.report.table import OPTIONAL_COLUMNS, footnotes, format_table, make_rows
from fimprobe.report.trends import format_trend, format_trends, make_trends
from fimprobe.runs.reader import read

MAX_RUNS = 20
"""Runs in the list of a folder."""


def show_run(records: list[dict[str, Any]], top: int, run: Mapping[str, Any]) -> None:
    """Print the last report's table and advice, the trends of the run, and how it was measured.

    Args:
        records: The reports of the run.
        top: Number of layers in the table.
        run: The information on the run; empty for an old file.
    """
    last, console = records[-1], _console()
    if console is None:
        print(format_table(last, top=top))
    else:
        _head(console, summary_line(last))
        _table(console, make_rows(last, top), total_last=True)
        for line in footnotes(last, top):
            console.print(_plain(line))
        _advice(console, last["advice"])
    not_shown = len(last["layers"]) - top
    if not_shown > 0:
        print(
            f"({not_shown} layers that need fewer pairs are not shown: --top {len(last['layers'])})"
        )
    if len(records) > 1:
        print("\n" + format_trend(records) + "\n")
        if console is None:
            print(format_trends(records))
        else:
            steps = f"{records[0]['step']} to {last['step']}"
            _head(console, f"Î₁ from step {steps} (bars: each from its least to its greatest, log)")
            _table(console, make_trends(records))
    run_info = format_run_info(run)
    if run_info:
        print()
    for name, text in run_info.items():
        print(f"{name + ':':12} {one_line(text)}")


def show_comparison(
    a: list[dict[str, Any]],
    b: list[dict[str, Any]],
    top: int,
    runs: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> None:
    """Print the last reports of two runs side by side, and the trends of both.

    Args:
        a: The reports of run A.
        b: The reports of run B.
        top: Number of layers in the table.
        runs: The information on both runs; empty for an old file.
    """
    console = _console()
    for difference in find_differences(a[-1], b[-1]):
        print(f"Careful: {one_line(difference)}")
    for setting in differing_settings(*runs):
        print(f"Measured differently: {one_line(setting)}")
    rows = make_comparison(a[-1], b[-1], top)
    title = f"Î₁ at step {a[-1]['step']} of A and step {b[-1]['step']} of B"
    if console is None:
        print("\n".join(["", title, *align(rows)]))
    else:
        _head(console, title)
        _table(console, rows, total_last=True)
    for name, records in (("A", a), ("B", b)):
        if len(records) > 1:
            print(f"\n{name}: {format_trends(records, top=min(top, 8))}")


def show_list(folder: str, files: list[Path]) -> None:
    """Print the runs in a folder, and the commands that show one or two of them.

    Args:
        folder: The folder.
        files: The files of its runs, newest first.
    """
    rows: list[Row] = [("run", "reports", "last step", "Î₁: 1 label", "written")]
    for file in files[:MAX_RUNS]:
        try:
            records = read(file)
        except FimprobeError:  # no report yet
            row: Row = ("0", "–", "–")
        else:
            last = records.reports[-1]
            row = (f"{len(records.reports):,}", f"{last['step']:,}")
            row += (percent(error_with_drawn_labels(last["total"]["i1"], last["batch_size"])),)
        written = datetime.fromtimestamp(file.stat().st_mtime)
        rows.append((str(file.parent), *row, f"{written:%Y-%m-%d %H:%M}"))
    print(f"{one_line(folder)} holds {len(files)} runs, newest first:\n")
    print("\n".join(align(rows)))
    if len(files) > MAX_RUNS:
        print(f"and {len(files) - MAX_RUNS} older")
    print(f"\nOne of them:      fimprobe show {shlex.quote(rows[1][0])}")
    both = " ".join(shlex.quote(row[0]) for row in rows[1:3])
    print(f"Two side by side: fimprobe show {both}")


def _console() -> Any:
    """Return rich's console; None without rich, or for output to a file or another program."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False, emoji=False)


def _head(console: Any, text: str) -> None:
    console.print(f"[bold]{_plain(text)}[/bold]")


def _advice(console: Any, lines: list[str]) -> None:
    for line in lines:
        console.print("• " + _plain(line))


def _table(console: Any, rows: list[Row], *, total_last: bool = False) -> None:
    """Print a table; heads wrap where the terminal is narrow, relative errors have colours."""
    from rich import box
    from rich.table import Table

    shown, widths = _fitting_columns(rows, console.width)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for i in shown:
        table.add_column(
            _plain(rows[0][i]), justify="right" if i else "left", min_width=widths[i], overflow="fold"
        )
    errors = {i for i, head in enumerate(rows[0]) if head.endswith(("rel. error", "1 label"))}
    for row in rows[1:]:
        if total_last and row is rows[-1]:
            table.add_section()
        cells = [_colour(row[i]) if i in errors else _plain(row[i]) for i in shown]
        table.add_row(*cells, style="bold" if total_last and row is rows[-1] else None)
    console.print(table)
    if len(shown) < len(widths):
        hidden = ", ".join(head for i, head in enumerate(rows[0]) if i not in shown)
        console.print(f"(a wider terminal also shows {_plain(hidden)})")


def _fitting_columns(rows: list[Row], total_width: int) -> tuple[list[int], list[int]]:
    """Return the columns that fit into a width, and the least widths of all columns.

    A whole column is left out before a number is cut in two: the optional ones in their order, then
    from the right. The first column always stays.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, (*head.split(), *cells))) for head, *cells in columns]
    shown = list(range(len(widths)))

    def rank(i: int) -> tuple[int, int]:
        head = rows[0][i]
        optional = head in OPTIONAL_COLUMNS
        return OPTIONAL_COLUMNS.index(head) if optional else len(OPTIONAL_COLUMNS), -i

    while len(shown) > 1 and sum(widths[i] + 3 for i in shown) > total_width:
        shown.remove(min(shown[1:], key=rank))
    return shown, widths


def _colour(cell: str) -> str:
    """Return a share in percent in green up to 10, in yellow up to 50, else in red."""
    match = re.fullmatch(r"(?:< )?([\d.,]+)( \w+)? %|> .* %", cell)
    if match is None:  # a dash, or a trend
        return _plain(cell)
    share = float(match[1].replace(",", "")) if match[1] and not match[2] else math.inf
    color = "green" if share <= 10 else "yellow" if share <= 50 else "red"
    return f"[{color}]{cell}[/{color}]"


def _plain(text: str) -> str:
    """Return one line whose brackets and backslashes rich does not read as markup."""
    from rich.markup import escape

    return str(escape(one_line(text)))
