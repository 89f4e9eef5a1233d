"""Numbers, percentages, bars and columns as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

BARS = "▁▂▃▄▅▆▇█"


Row = tuple[str, ...]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def align(rows: Sequence[Row]) -> list[str]:
    """Lines of equal columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def trend(values: Sequence[float | None], show: Callable[[float | None], str]) -> str:
    """First value, bars, last value; a dash where that is not known.

    >>> trend([0.01, 0.1, None], percent)
    '     1 % ▁█         –'
    """
    if all(v is None for v in values):
        return "–"
    return f"{show(values[0]):>8} {sparkline(values)} {show(values[-1]):>8}"


def sparkline(values: Sequence[float | None], width: int = 16) -> str:
    """Bars on a logarithmic scale from the least to the greatest; blank where nothing is known.

    Values that are not above 0 count as the least.

    >>> sparkline([1, 10, 100, None, 1000, 0])
    '▁▃▆ █▁'
    >>> sparkline([2, 2, 2])
    '▄▄▄'
    """
    shown = subsample(values, width)
    positive = [math.log(v) for v in shown if v is not None and v > 0]
    low, high = min(positive, default=0.0), max(positive, default=0.0)

    def bar(value: float | None) -> str:
        if value is None:
            return " "
        if high - low < 1e-9:
            return BARS[3]
        share = (math.log(value) - low) / (high - low) if value > 0 else 0.0
        return BARS[round(share * (len(BARS) - 1))]

    return "".join(map(bar, shown))


def subsample(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` items, evenly spaced, the first and the last among them.

    >>> thin(range(10), 4)
    [0, 3, 6, 9]
    """
    last, shown = len(items) - 1, min(most, len(items))
    return [items[i] for i in sorted({round(i * last / max(shown - 1, 1)) for i in range(shown)})]


def number(x: float | None) -> str:
    """Three digits, or a dash.

    >>> number(1234.5), number(0.00012345), number(None)
    ('1,230', '0.000123', '–')
    """
    if x is None:
        return "–"
    short = float(f"{x:.3g}")
    return f"{short:,.0f}" if 1e3 <= abs(short) < 1e6 else f"{short:.3g}"


def percent(x: float | None) -> str:
    """A share in percent.

    >>> percent(0.1234), percent(12.345), percent(123456.7), percent(1e-9)
    ('12.3 %', '1,234 %', '12.3 million %', '< 0.001 %')
    """
    if x is None:
        return "–"
    share = 100 * x
    if 0 < share < 1e-3:
        return "< 0.001 %"
    return f"{count(share) if float(f'{share:.3g}') >= 1e3 else f'{share:.3g}'} %"


def times(ratio: float) -> str:
    """How many times as much.

    >>> times(0.123), times(99.9), times(2e6)
    ('0.12×', '100×', '2 million×')
    """
    short = float(f"{ratio:.2g}")
    return f"{count(ratio)}×" if short >= 100 else f"{short:.2g}×"


def count(x: float | None) -> str:
    """A number of pairs or inputs, at least one.

    >>> count(0.2), count(12345.6), count(123456), count(5.48e6), count(1e20)
    ('1', '12,346', '123,000', '5.48 million', '> 1,000 trillion')
    """
    if x is None:
        return "–"
    short = float(f"{x:.3g}")
    if short < 1e6:
        return f"{max(x if x < 1e5 else short, 1):,.0f}"
    for size, word in ((1e9, "million"), (1e12, "billion"), (1e15, "trillion")):
        if short < size:
            return f"{short / size * 1e3:.3g} {word}"
    return "> 1,000 trillion"
