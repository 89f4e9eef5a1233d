"""The main tables of docs/performance.md, and what got slower since they were committed.

python tests/benchmarks/suite.py > tables.md    (see docs/performance.md for how long it takes)

The tables are those of ``cost.py``; its options hold here too. A time is marked ▲ where it is above
the committed one by more than the noise of both: their interquartile ranges do not overlap. Ratios to
a forward+backward are compared, so that the two machines need not be the same.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from clock import Ratio
from cost import measure_columns, parse_options, print_machine, report

COMMITTED = Path(__file__).parents[2] / "docs" / "performance.md"

_RATIO = re.compile(r"(?P<middle>[\d.]+) \((?P<low>[\d.]+) – (?P<high>[\d.]+)\)")
_HEAD = "forward+backward"


def parse_ratios(text: str) -> dict[tuple[str, str], Ratio]:
    """The cells of the first table with a row ``forward+backward``, by row and column.

    Cells without quartiles, and those of rows that compute something else (✗), are left out.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith(f"| {_HEAD} |")), None)
    if first is None:
        return {}
    columns = _cells(lines[first - 2])[1:]
    found = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        row, *cells = _cells(line)
        for column, cell in zip(columns, cells, strict=True):
            ratio = _RATIO.search(cell)
            if ratio and "✗" not in cell:
                found[row, column] = Ratio(*(float(ratio[k]) for k in ("middle", "low", "high")))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def is_slower(now: Ratio, before: Ratio) -> bool:
    """Whether the whole interquartile range, and the median, are above those of before."""
    return min(now) > max(before)


def mark_slower(text: str, committed: str) -> tuple[str, list[str]]:
    """The output with marked cells, and a line for each of them.

    Args:
        text: The output of ``report``.
        committed: The page with the table of before.
    """
    before, marked = parse_ratios(committed), []
    lines = text.splitlines()
    now = parse_ratios(text)
    for (row, column), ratio in now.items():
        known = before.get((row, column))
        if known is not None and is_slower(ratio, known):
            marked.append(f"- ▲ {row}, {column.split(',')[0]}: {ratio}, was {known}")
            place = next(i for i, line in enumerate(lines) if line.startswith(f"| {row} |"))
            cells = _cells(lines[place])
            index = 1 + list(dict.fromkeys(c for _, c in now)).index(column)
            cells[index] = f"▲ {cells[index]}"
            lines[place] = f"| {' | '.join(cells)} |"
    return "\n".join(lines), marked


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore")
    print_machine()
    columns, rows = measure_columns(options)
    text, marked = mark_slower(report(columns, rows, options), COMMITTED.read_text("utf-8"))
    print(text)
    print("\nSlower than the committed table by more than the noise of both:\n")
    print("\n".join(marked or ["- nothing"]))


if __name__ == "__main__":
    main()
