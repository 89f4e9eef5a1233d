"""Numbers, percentages, bars and columns as text."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

BARS = "▁▂▃▄▅▆▇█"

Row = tuple[str, ...]
"""The cells of a row of a table."""


MIN_WIDTH = 60
"""Characters of a line that a table needs, for no number to be cut."""


def terminal_width() -> int | None:
    """Return the characters of a line: of the terminal, or of the variable COLUMNS; at least 60.

    It is None where output goes to a file or a program and COLUMNS is not set: lines are not broken.
    """
    columns = os.environ.get("COLUMNS", "")
    if not sys.stdout.isatty() and not (columns.isdecimal() and int(columns)):
        return None
    return max(shutil.get_terminal_size().columns, MIN_WIDTH)


def one_line(text: str) -> str:
    """Return a text with its control characters as escapes, so that it is one line of plain text.

    Names of layers and files may hold line breaks, terminal escapes and marks that turn the direction
    of writing.

    >>> one_line("a\\x1b[31m\\nb"), one_line("Î₁ of 0.weight")
    ('a\\\\x1b[31m\\\\nb', 'Î₁ of 0.weight')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and the number of the others.

    Args:
        names: The names.
        most: Number of names in the text.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(map(one_line, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def listed(names: Sequence[str]) -> str:
    """Return all names as an enumeration.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    lines = [one_line(name) for name in names]
    return " and ".join([", ".join(lines[:-1]), lines[-1]] if len(lines) > 1 else lines)


def align(rows: Sequence[Row]) -> list[str]:
    """Return lines of equal columns, the first column aligned to the left."""
    rows = [tuple(map(one_line, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def trend(values: Sequence[float | None], first: str, last: str) -> str:
    """Return the first value, bars and the last value, or a dash where all are unknown.

    Args:
        values: The values over time; None where unknown.
        first: The text of the first value.
        last: The text of the last value.

    >>> trend([0.01, 0.1, None], "1 %", "–")
    '     1 % ▁█         –'
    """
    if all(v is None for v in values):
        return "–"
    return f"{first:>8} {sparkline(values)} {last:>8}"


def sparkline(values: Sequence[float | None], width: int = 16) -> str:
    """Return bars on a logarithmic scale from the least to the greatest value.

    Args:
        values: The values; an unknown one (None) is blank, one that is not positive is the least.
        width: Number of bars; more values are subsampled.

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
    """Return at most ``most`` items, evenly spaced, with the first and the last one.

    Args:
        items: All items.
        most: Maximum number of items.

    >>> subsample(range(10), 4)
    [0, 3, 6, 9]
    """
    last, shown = len(items) - 1, min(most, len(items))
    return [items[i] for i in sorted({round(i * last / max(shown - 1, 1)) for i in range(shown)})]


def number(x: float | None) -> str:
    """Return three digits, or a dash.

    >>> number(1234.5), number(0.00012345), number(None)
    ('1,230', '0.000123', '–')
    """
    if x is None:
        return "–"
    short = float(f"{x:.3g}")
    return f"{short:,.0f}" if 1e3 <= abs(short) < 1e6 else f"{short:.3g}"


def with_error(value: float | None, error: float | None) -> str:
    """Return a value ± its standard error, with the digits that the error allows.

    Args:
        value: The value; None where it is unknown.
        error: Its standard error; None where it is unknown.

    >>> with_error(13.04, 1.49), with_error(123456, 2345), with_error(1.234e-5, 2.1e-6)
    ('13.0 ± 1.5', '123,500 ± 2,300', '(1.23 ± 0.21)e-5')
    >>> with_error(6.5, None), with_error(None, None), with_error(0, 0), with_error(1, 1e-9)
    ('6.5 ± –', '–', '0', '1.00000 ± 1e-09')
    """
    if value is None:
        return "–"
    if error is None:
        return f"{number(value)} ± –"
    if not error > 0:
        return number(value)
    exponent = math.floor(math.log10(max(abs(value), error)))
    if -4 < exponent < 6:
        return " ± ".join(_with_digits(value, error))
    scale = 10.0**exponent
    return f"({' ± '.join(_with_digits(value / scale, error / scale))})e{exponent}"


def without_error(text: str) -> str:
    """Return a value ± its error without the error, in the same digits as in a table with it.

    >>> [without_error(text) for text in ("96 ± 27", "(1.23 ± 0.21)e-5", "5.48 ± 0.11 million", "–")]
    ['96', '1.23e-5', '5.48 million', '–']
    """
    return re.sub(r"\(?([^ (]+) ± [^ )]+\)?", r"\1", text)


def _with_digits(value: float, error: float, *, whole: bool = False) -> tuple[str, str]:
    """Return a value and its error, both to the second digit of the error.

    Args:
        value: The value.
        error: Its error, above 0.
        whole: Whether both are whole numbers.
    """
    last_place = math.floor(math.log10(float(f"{error:.1e}"))) - 1
    if value:  # a value has six digits at most
        last_place = max(last_place, math.floor(math.log10(abs(value))) - 5)
    last_place = max(last_place, 0) if whole else last_place
    decimals = max(-last_place, 0)
    short, short_error = (f"{round(x, -last_place):,.{decimals}f}" for x in (value, error))
    return short, short_error if float(short_error.replace(",", "")) else f"{error:.2g}"


def count_with_error(x: float | None, share: float | None) -> str:
    """Return a number of pairs ± its standard error, or the number alone.

    Args:
        x: The number; None where it is unknown.
        share: Its relative standard error; None where it is unknown.

    >>> count_with_error(1622.0, 0.1234), count_with_error(5.48e6, 0.02)
    ('1,620 ± 200', '5.48 ± 0.11 million')
    >>> count_with_error(2.4, 0.1), count_with_error(1e20, 0.1), count_with_error(None, None)
    ('2', '> 1,000 trillion', '–')
    """
    if x is None or share is None or not share > 0 or x * share < 1:
        return count(x)
    words = count(x).split(" ")
    if words[0] == ">":
        return count(x)
    size = {"million": 1e6, "billion": 1e9, "trillion": 1e12}.get(words[-1], 1.0)
    text = " ± ".join(_with_digits(x / size, x * share / size, whole=size == 1.0))
    return text if size == 1.0 else f"{text} {words[-1]}"


def quantity(x: float, noun: str) -> str:
    """Return a number with its noun, in the singular for one.

    Args:
        x: The number.
        noun: The noun in the singular, which takes an s.

    >>> quantity(1, "input"), quantity(1.4, "input"), quantity(0, "input"), quantity(12345, "report")
    ('1 input', '1 input', '0 inputs', '12,345 reports')
    """
    shown = "0" if x == 0 else count(x)
    return f"{shown} {noun}{'' if shown == '1' else 's'}"


def percent(x: float | None) -> str:
    """Return a share in percent, or a dash.

    >>> percent(0.1234), percent(12.345), percent(123456.7), percent(1e-9)
    ('12.3 %', '1,234 %', '12.3 million %', '< 0.001 %')
    """
    if x is None:
        return "–"
    share = 100 * x
    if 0 < share < 1e-3:
        return "< 0.001 %"
    return f"{count(share) if float(f'{share:.3g}') >= 1e3 else f'{share:.3g}'} %"


def factor(ratio: float) -> str:
    """Return a ratio with two digits, from 100 on as a whole number.

    >>> factor(0.123), factor(99.9), factor(667.2), factor(2e6)
    ('0.12', '100', '667', '2 million')
    """
    short = float(f"{ratio:.2g}")
    return count(ratio) if short >= 100 else f"{short:.2g}"


def count(x: float | None) -> str:
    """Return a number of pairs or inputs, at least one, or a dash.

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
