"""How much a report measures under a time budget, and what each such report is expected to cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class Extent(IntEnum):
    """What a report contains, the cheapest first."""

    PREVIEW = 0
    """Î₁, and what else the options ask for beside Î₂ and the bounds."""
    WITHOUT_BOUNDS = 1
    """Î₂, too, where its label variance can be measured without the bounds and blocks."""
    WHOLE = 2
    """Everything."""


FIRST_STEP_COSTS = (6.0, 14.0, 24.0)
"""Seconds, in steps of the loop, that each extent adds to the first report with it: Î₁ and the copy
of the model with its verification, Î₂, the bounds (measured on transformers of four layers, whose
steps take 0.1 to 0.6 s: 3.5 to 5.8, 12 to 15, 23 to 25)."""

FIRST_LAYER_SECONDS = (0.003, 0.035, 0.01)
"""The same in seconds for each layer, which counts where many small layers make Python the cost
(measured with 300 layers of width 32: 1, 10 and 3 s, where a step takes 15 ms)."""


SHARE_BELOW = 0.4
"""Share of the seconds of a larger report that one of a new, smaller extent is expected to take."""


@dataclass(kw_only=True)
class ExtentCosts:
    """The seconds of the reports of one extent.

    Attributes:
        first: Those of the first one, which also verifies the model; None without one.
        recurring: Share of them that later ones are expected to take.
        later: Those of the last ones, without the first.
    """

    first: float | None = None
    recurring: float = 1.0
    later: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    def add(self, seconds: float) -> None:
        """Record the seconds of a report."""
        if self.first is None:
            self.first = seconds
        else:
            self.later.append(seconds)

    @property
    def expected(self) -> float | None:
        """Expected seconds of the next one, the largest of the last few; None before the first."""
        if self.later:
            return max(self.later)
        return None if self.first is None else self.first * self.recurring


@dataclass(kw_only=True)
class ReportCosts:
    """What reports of each extent cost, learned from those that were made.

    Attributes:
        extents: The different extents that the options allow, the cheapest first.
        num_layers: Number of modules with parameters of their own.
        of: The seconds of the reports of each.
    """

    extents: Sequence[Extent] = (Extent.WHOLE,)
    num_layers: int = 0
    of: dict[Extent, ExtentCosts] = field(default_factory=lambda: {e: ExtentCosts() for e in Extent})

    @property
    def has_whole(self) -> bool:
        """Whether there was a report that was no preview."""
        return any(self.of[e].first is not None for e in Extent if e is not Extent.PREVIEW)

    def leave_out_i2(self, *, has_bounds: bool) -> None:
        """Expect no report with Î₂ any more.

        Args:
            has_bounds: Whether whole reports still contain bounds.
        """
        self.extents = (Extent.PREVIEW, Extent.WHOLE) if has_bounds else (Extent.WHOLE,)

    def include_bounds(self) -> None:
        """Leave bounds out of no report but previews, since they add little to what it costs."""
        self.extents = [extent for extent in self.extents if extent is not Extent.WITHOUT_BOUNDS]

    def expected(self, extent: Extent, step_seconds: float) -> float:
        """Return the expected seconds of the next report.

        Args:
            extent: What it contains.
            step_seconds: Those of a step of the loop, by which parts are judged that are new, besides
                the number of layers.

        Returns:
            The seconds; 0 for the first and cheapest report, which happens in any case.
        """
        known = self.of[extent].expected
        if known is not None:
            return known
        above = [self.of[e].expected for e in self.extents if e > extent]
        if any(above):
            return SHARE_BELOW * min(seconds for seconds in above if seconds)
        if extent is self.extents[0]:
            return 0.0
        known_below = [self.of[e].expected or 0.0 for e in self.extents if e < extent]
        new = range(sum(seconds > 0 for seconds in known_below), len(known_below) + 1)
        by_part = zip(FIRST_STEP_COSTS, FIRST_LAYER_SECONDS, strict=True)
        costs = [max(steps * step_seconds, each * self.num_layers) for steps, each in by_part]
        return max(known_below) + sum(costs[i] for i in new)
