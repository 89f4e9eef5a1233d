"""Runs in the terminal: with ``rich`` where it is installed and someone looks, else plain lines."""

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
from fimprobe.report.format import Row, align, percent
from fimprobe.report.run_info import differing_settings, format_run_info
from fimprobe.report.table import (
    OPTIONAL_COLUMNS,
    differences,
    footnotes,
    format_table,
    format_trend,
    format_trends,
    make_comparison,
    make_rows,
    make_trends,
    one_label_error,
    summary_line,
)
from fimprobe.runs.reader import read

MOST_RUNS = 20
"""Runs in the list of a folder."""


def show_run(records: list[dict[str, Any]], top: int, run: Mapping[str, Any]) -> None:
    """The last report's table and advice, the trends of the run, and how it was measured."""
    last, console = records[-1], _console()
    if console is None:
        print(format_table(last, top=top))
    else:
        _head(console, summary_line(last))
        _table(console, make_rows(last, top), total_last=True)
        for line in footnotes(last, top):
            console.print(_plain(line))
        _advice(console, last["advice"])
    left = len(last["layers"]) - top
    if left > 0:
        print(f"({left} layers that need fewer pairs are not shown: --top {len(last['layers'])})")
    if len(records) > 1:
        print("\n" + format_trend(records) + "\n")
        if console is None:
            print(format_trends(records))
        else:
            steps = f"{records[0]['step']} to {last['step']}"
            _head(console, f"Î₁ from step {steps} (bars: each from its least to its greatest, log)")
            _table(console, make_trends(records))
    told = format_run_info(run)
    if told:
        print()
    for name, text in told.items():
        print(f"{name + ':':12} {text}")


def show_comparison(
    a: list[dict[str, Any]],
    b: list[dict[str, Any]],
    top: int,
    runs: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> None:
    """Two runs: their last reports side by side, and the trends of both."""
    console = _console()
    for told in differences(a[-1], b[-1]):
        print(f"Careful: {told}")
    for told in differing_settings(*runs):
        print(f"Measured differently: {told}")
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
    """The runs in a folder, newest first, and how to look at one or two of them."""
    rows: list[Row] = [("run", "reports", "last step", "Î₁: 1 label", "written")]
    for file in files[:MOST_RUNS]:
        try:
            records = read(file)
        except FimprobeError:  # no report yet
            row: Row = ("0", "–", "–")
        else:
            last = records.reports[-1]
            row = (f"{len(records.reports):,}", f"{last['step']:,}")
            row += (percent(one_label_error(last["total"]["i1"], last["batch_size"])),)
        at = datetime.fromtimestamp(file.stat().st_mtime)
        rows.append((str(file.parent), *row, f"{at:%Y-%m-%d %H:%M}"))
    print(f"{folder} holds {len(files)} runs, newest first:\n")
    print("\n".join(align(rows)))
    if len(files) > MOST_RUNS:
        print(f"and {len(files) - MOST_RUNS} older")
    print(f"\nOne of them:      fimprobe show {shlex.quote(rows[1][0])}")
    both = " ".join(shlex.quote(row[0]) for row in rows[1:3])
    print(f"Two side by side: fimprobe show {both}")


def _console() -> Any:
    """rich's console; None where there is none, or the output goes to a file or another program."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


def _head(console: Any, text: str) -> None:
    console.print(f"[bold]{_plain(text)}[/bold]")


def _advice(console: Any, lines: list[str]) -> None:
    for line in lines:
        console.print("• " + _plain(line))


def _table(console: Any, rows: list[Row], *, total_last: bool = False) -> None:
    """Heads wrap where the terminal is narrow; relative errors are coloured by how bad they are."""
    from rich import box
    from rich.table import Table

    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, (*column[0].split(), *column[1:]))) for column in columns]
    kept, left = list(range(len(widths))), []
    while len(kept) > 1 and sum(widths[i] + 3 for i in kept) > console.width:
        # a number cut in two is worse than one left out
        ranks = [
            (
                OPTIONAL_COLUMNS.index(rows[0][i])
                if rows[0][i] in OPTIONAL_COLUMNS
                else len(OPTIONAL_COLUMNS),
                -i,
            )
            for i in kept[1:]
        ]
        left.append(kept.pop(1 + ranks.index(min(ranks))))
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for i in kept:
        table.add_column(
            _plain(rows[0][i]), justify="right" if i else "left", min_width=widths[i], overflow="fold"
        )
    errors = {i for i, head in enumerate(rows[0]) if head.endswith(("rel. error", "1 label"))}
    for row in rows[1:]:
        if total_last and row is rows[-1]:
            table.add_section()
        cells = [_colour(row[i]) if i in errors else _plain(row[i]) for i in kept]
        table.add_row(*cells, style="bold" if total_last and row is rows[-1] else None)
    console.print(table)
    if left:
        names = ", ".join(rows[0][i] for i in sorted(left))
        console.print(f"(a wider terminal also shows {_plain(names)})")


def _colour(cell: str) -> str:
    """A share in percent, green to 10, yellow to 50, red above."""
    found = re.fullmatch(r"(?:< )?([\d.,]+)( \w+)? %|> .* %", cell)
    if found is None:  # a dash, or a trend
        return _plain(cell)
    share = float(found[1].replace(",", "")) if found[1] and not found[2] else math.inf
    color = "green" if share <= 10 else "yellow" if share <= 50 else "red"
    return f"[{color}]{cell}[/{color}]"


def _plain(text: str) -> str:
    """Brackets that rich shall not read as markup."""
    return text.replace("[", "\\[")
