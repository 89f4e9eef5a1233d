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
from fimprobe.report.comparison import COMPARED, find_differences, make_comparison
from fimprobe.report.footnotes import explain, footnotes
from fimprobe.report.format import Row, align, one_line, percent, quantity, terminal_width
from fimprobe.report.partial_reports import describe_earlier, earlier_whole_report
from fimprobe.report.record import summary_line
from fimprobe.report.run_info import differing_settings, format_run_info
from fimprobe.report.table import (
    fit_rows,
    format_report,
    hidden_columns,
    hidden_layers,
    make_rows,
    wrap,
)
from fimprobe.report.trends import format_trend, format_trends, make_trends, title_of_trends
from fimprobe.runs.reader import read

MAX_RUNS = 20
"""Runs in the list of a folder."""


def show_run(records: list[dict[str, Any]], top: int, run: Mapping[str, Any]) -> None:
    """Print the last report, the trends of the run, and how it was measured.

    Args:
        records: The reports of the run.
        top: Number of layers in the table.
        run: The information on the run; empty for an old file.
    """
    last, width, console = records[-1], terminal_width(), _console()
    earlier = earlier_whole_report(records)
    below = "" if earlier is None else describe_earlier(earlier)
    if console is None:
        print(format_report(last, top, below=below, width=width))
    else:
        _head(console, summary_line(last))
        hidden = _table(console, make_rows(last, top), total_last=True)
        for line in wrap([*footnotes(last, top, without=hidden), *hidden_layers(last, top)], width):
            console.print(_plain(line))
        print("\n".join(["", *wrap([below], width), ""] if below else []))
        for line in wrap([f"• {sentence}" for sentence in last["advice"]], width):
            console.print(_plain(line))
    if len(records) > 1:
        print("\n" + format_trend(records, width=width) + "\n")
        if console is None:
            print(format_trends(records, width=width))
        else:
            _head(console, title_of_trends(records))
            hidden = _table(console, make_trends(records))
            shown = [head for head in ("label variance",) if head not in hidden]
            print("\n".join(wrap(explain(last, shown), width)))
    run_info = format_run_info(run)
    if run_info:
        print()
    for name, text in run_info.items():
        print("\n".join(wrap([f"{name + ':':12} {text}"], width)))


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
    console, width = _console(), terminal_width()
    warnings = [f"Careful: {difference}" for difference in find_differences(a[-1], b[-1])]
    warnings += [f"Measured differently: {setting}" for setting in differing_settings(*runs)]
    for line in wrap(warnings, width):
        print(line)
    for shown in range(len(COMPARED), 0, -1):
        rows = make_comparison(a[-1], b[-1], top, columns=COMPARED[:shown])
        if width is None or max(map(len, align(rows))) <= width:
            break
    title = f"Î₁ at step {a[-1]['step']:,} of A and step {b[-1]['step']:,} of B"
    if console is None:
        print("\n".join(["", title, *align(rows)]))
    else:
        _head(console, title)
        _table(console, rows, total_last=True)
    heads = [column.head for column in COMPARED]
    notes = explain(a[-1], [x for x in ("label variance", "pairs for 10 %") if x in heads[:shown]])
    if heads[shown:]:
        notes.append(f"({hidden_columns(heads[shown:])})")
    print("\n".join(wrap(notes, width)))
    explained = ["1 label", *([] if "label variance" in heads[:shown] else ["label variance"])]
    for name, records in (("A", a), ("B", b)):
        if len(records) > 1:
            lines = format_trends(records, min(top, 8), width=width, explained=explained)
            print(f"\nRun {name}\n{lines}")
            # once, unless the numbers of inputs in it differ
            explained = ["1 label"] * (a[-1]["batch_size"] != b[-1]["batch_size"])


def show_list(folder: str, files: list[Path]) -> None:
    """Print the runs in a folder, and the commands that show one or two of them.

    Args:
        folder: The folder.
        files: The files of its runs, newest first.
    """
    rows: list[Row] = [("run", "reports", "last step", "error: Î₁", "written")]
    for file in files[:MAX_RUNS]:
        try:
            records = read(file)
        except FimprobeError:  # no report yet
            row: Row = ("0", "–", "–")
        else:
            last = records.reports[-1]
            row = (f"{len(records.reports):,}", f"{last['step']:,}")
            row += (percent(last["total"]["i1"].get("rel_error")),)
        written = datetime.fromtimestamp(file.stat().st_mtime)
        rows.append((str(file.parent), *row, f"{written:%Y-%m-%d %H:%M}"))
    print(f"{one_line(folder)} holds {quantity(len(files), 'run')}, newest first:\n")
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


def _table(console: Any, rows: list[Row], *, total_last: bool = False) -> list[str]:
    """Print the columns of a table that fit, with colours, and return the heads of the others."""
    from rich.text import Text

    rows, hidden = fit_rows(rows, console.width)
    lines = align(rows)
    widths = [max(map(len, map(one_line, column))) for column in zip(*rows, strict=True)]
    rule = "─" * max(map(len, lines))
    console.print(Text(lines[0], style="bold"), soft_wrap=True)
    console.print(rule, soft_wrap=True)
    for row, line in zip(rows[1:], lines[1:], strict=True):
        is_total = total_last and row is rows[-1]
        text = Text(line, style="bold" if is_total else "")
        for i, head in enumerate(rows[0]):
            color = _color(row[i]) if head.startswith(("error", "1 label")) else None
            if color:
                start = sum(widths[:i]) + 2 * i
                text.stylize(color, start, start + widths[i])
        if is_total:
            console.print(rule, soft_wrap=True)
        console.print(text, soft_wrap=True)
    if hidden:
        console.print(f"({_plain(hidden_columns(hidden))})")
    return hidden


def _color(cell: str) -> str | None:
    """Return green for a share up to 10 %, yellow up to 50 %, else red; None for other cells."""
    match = re.fullmatch(r"(?:< )?([\d.,]+)( \w+)? %|> .* %", cell)
    if match is None:  # a dash, or a trend
        return None
    share = float(match[1].replace(",", "")) if match[1] and not match[2] else math.inf
    return "green" if share <= 10 else "yellow" if share <= 50 else "red"


def _plain(text: str) -> str:
    """Return one line whose brackets and backslashes rich does not read as markup."""
    from rich.markup import escape

    return str(escape(one_line(text)))
