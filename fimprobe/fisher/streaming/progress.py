"""One line on the terminal: the present error and the expected end."""

from __future__ import annotations

import sys
import time

INTERVAL_SECONDS = 0.5
"""Shortest time between two lines."""


class ProgressLine:
    """Rewrites one line of the standard error; silent where that is no terminal.

    Args:
        shown: Whether a line is wanted.
        target: The error to reach.
    """

    def __init__(self, *, shown: bool, target: float) -> None:
        self.shown = shown and sys.stderr.isatty()
        self.target = target
        self.started = time.monotonic()
        self._last, self._width = 0.0, 0

    def update(self, inputs: int, rel_error: float | None, needed: float | None) -> None:
        """Write the line.

        Args:
            inputs: Number of inputs so far.
            rel_error: The present error; None if it is not known yet.
            needed: Expected number of inputs at the end.
        """
        now = time.monotonic()
        if not self.shown or now - self._last < INTERVAL_SECONDS:
            return
        self._last = now
        self._write(describe(inputs, rel_error, needed, self.target, now - self.started))

    def close(self) -> None:
        """Clear the line."""
        if self.shown and self._width:
            self._write("")
            sys.stderr.write("\r")

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)


def describe(
    inputs: int, rel_error: float | None, needed: float | None, target: float, seconds: float
) -> str:
    """Return the line.

    Args:
        inputs: Number of inputs so far.
        rel_error: The present error.
        needed: Expected number of inputs at the end.
        target: The error to reach.
        seconds: Time so far.

    >>> describe(500, 0.2, 2000.0, 0.1, 5.0)
    'fimprobe: 500 inputs, error 20 % (target 10 %), about 15 s left'
    """
    text = f"fimprobe: {inputs:,} inputs"
    if rel_error is None or rel_error == float("inf"):
        return text + ", error not known yet"
    text += f", error {100 * rel_error:.3g} % (target {100 * target:.3g} %)"
    if needed is None or inputs == 0:
        return text
    return text + f", about {max(0.0, seconds * (needed / inputs - 1)):.0f} s left"
