"""The numbers at the ticks of logarithmic axes, and their text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST = 9


def round_limits(low: float, high: float) -> tuple[float, float]:
    """Return the next 1, 2 or 5 times a power of ten below and above an interval.

    Args:
        low: The least number, above 0.
        high: The greatest number.

    >>> round_limits(0.25, 0.98), round_limits(0.1, 1.0)
    ((0.2, 1.0), (0.1, 1.0))
    """
    numbers = _multiples(low / 10, high * 10, (1, 2, 5))
    below, above = numbers[numbers <= low * (1 + 1e-9)], numbers[numbers >= high * (1 - 1e-9)]
    return float(below[-1]), float(above[0])


def round_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... between two numbers; powers of ten alone over many of them.

    Args:
        low: The least number, above 0.
        high: The greatest number.

    >>> round_ticks(0.09, 1.2), round_ticks(0.5, 2e3)
    ([0.1, 0.2, 0.5, 1.0], [1.0, 10.0, 100.0, 1000.0])
    """
    ticks: list[float] = _multiples(low, high, (1, 2, 5) if high < 1000 * low else (1,)).tolist()
    return ticks[:: max(-(-len(ticks) // _MOST), 1)]


def name_power(x: float) -> str:
    """Return 1, 10, ..., 100 k, 100 M in words, other numbers as powers of ten.

    >>> name_power(100), name_power(1e5), name_power(1e-12)
    ('100', '100 k', '10⁻¹²')
    """
    for size, unit in ((1e6, " M"), (1e4, " k"), (1.0, "")):
        if size <= x < 1e9:
            return f"{x / (1e3 if unit == ' k' else size):,.0f}{unit}"
    # superscripts in place of a formula, whose layout takes longer than the rest of the figure
    return f"10{str(round(np.log10(x))).translate(_SUPERSCRIPTS)}" if x > 0 else ""


def _multiples(low: float, high: float, digits: Sequence[int]) -> np.ndarray:
    """Return digits times powers of ten between two numbers, the least first.

    Args:
        low: The least number, above 0.
        high: The greatest number.
        digits: The digits, the least first.
    """
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    numbers = np.array([float(f"{digit}e{exponent}") for exponent in exponents for digit in digits])
    return numbers[(numbers >= low * (1 - 1e-9)) & (numbers <= high * (1 + 1e-9))]
