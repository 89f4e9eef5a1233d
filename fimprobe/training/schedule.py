"""Schedules of measurements: every n steps, at given steps, or within a share of the wall time."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from dataclasses import KW_ONLY, dataclass, field

from fimprobe.errors import FimprobeError
from fimprobe.training.report_costs import Extent, ReportCosts


class Schedule:
    """Decides when to measure, from the times that the loop and the probe need."""

    def due(self, step: int) -> bool:
        """Return whether to measure at this optimizer step."""
        raise NotImplementedError

    def start(self, *, full: bool, loop_seconds: float) -> Extent:
        """Start a measurement; return what it contains.

        Args:
            full: Whether it is to contain everything.
            loop_seconds: Time of the training loop since the last step.
        """
        return Extent.WHOLE

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Record the time of one step.

        Args:
            loop_seconds: Time of the training loop.
            probe_seconds: Time of the probe.
        """

    def can_afford(self, seconds: float) -> bool:
        """Return whether figures may use so many seconds now; if not, reserve time for them."""
        return True

    def affordable_steps(self) -> float | None:
        """Return how many steps of the loop one report may cost; None for any number."""
        return None

    def charge(self, seconds: float) -> None:
        """Record the seconds that figures used during the current step."""

    def expect(self, share: float) -> None:
        """Expect later measurements to cost a share of the one that runs now, if it is the first."""

    def fail(self, seconds: float) -> None:
        """Record the seconds of a measurement that the batch did not allow."""


@dataclass
class Every(Schedule):
    """A measurement at the steps 0, n, 2n, ...

    >>> [step for step in range(7) if Every(3).due(step)]
    [0, 3, 6]
    """

    every: int

    def __post_init__(self) -> None:
        """Check that n is a positive number of steps."""
        if isinstance(self.every, bool) or self.every < 1:
            raise FimprobeError(
                f"schedule every must be a positive number of steps, got {self.every!r}. Use "
                'schedule={"every": 100} to measure every 100th step.'
            )

    def due(self, step: int) -> bool:
        """Return whether n divides the step."""
        return step % self.every == 0


@dataclass
class At(Schedule):
    """A measurement at the listed steps."""

    at: list[int]

    def __post_init__(self) -> None:
        """Prepare a set: ``due`` is called several times per step, and the list may be long."""
        self._steps = frozenset(self.at)

    def due(self, step: int) -> bool:
        """Return whether the step is listed."""
        return step in self._steps


FREE_SECONDS = 5.0
"""Seconds of early reports, all together, that no share of the wall time has to cover."""

SHARE_OF_ALLOWANCE = 1 / 3
"""Of what is left of the allowance, the most that another report of more than Î₁ may use: several
previews show more than a single report that measures Î₂ again."""


MOST_DELAY = 0.2
"""Of the seconds of the first report with Î₂, the most that the share pays for a preview earlier."""


def next_early_step(number: int) -> int:
    """Return the first of 1, 2, 5, 10, 20, 50, 100, ... above a number.

    >>> [next_early_step(n) for n in (0, 1, 2, 7, 10, 99)]
    [1, 2, 5, 10, 20, 100]
    """
    decade = 1
    while True:
        for early in (decade, 2 * decade, 5 * decade):
            if early > number:
                return early
        decade *= 10


@dataclass
class Budget(Schedule):
    """Early reports within a free allowance; then as many as a share of the wall time permits.

    Early reports are those at the steps 1, 2, 5, 10, 20, 50, 100, ... after the start. Each is due if
    its expected cost fits into what is left of ``FREE_SECONDS`` and of the share; the first happens
    anyway. Others are due when the seconds charged so far and their expected cost fit into the share
    of the elapsed time. A report contains as much as fits. Bounds are left out of every second one
    where they do not fit; previews of Î₁ alone are early reports only. A pause of the loop counts as
    ten usual steps at most. Half of the share is reserved for figures that are waiting.

    Attributes:
        budget: Share of the wall time, between 0 and 1.
        costs: What reports cost, and what they may leave out.
        spent: Seconds that the probe used.
        free: Those of them that the allowance covers.
        elapsed: Seconds of the loop, long pauses shortened.
        num_steps: Steps so far.
        next_early: The number of the step of the next early report.
        steps: Seconds of the last steps of the loop.
        running: Seconds of the loop in the current step, once it is measured: the very first step
            takes longer than others.
        extent: What the measurement at hand contains.
        owes_bounds: Whether the last report that was no preview had no bounds, though it might have.
        reserved: Seconds that waiting figures need.
        reserved_since: ``elapsed`` when they began to wait.
        charged: Seconds of figures in the current step, already part of ``spent``.
    """

    budget: float
    _: KW_ONLY
    costs: ReportCosts = field(default_factory=ReportCosts)
    spent: float = 0.0
    free: float = 0.0
    elapsed: float = 0.0
    num_steps: int = 0
    next_early: int = 1
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    running: float = math.inf
    extent: Extent = Extent.WHOLE
    owes_bounds: bool = False
    reserved: float = 0.0
    reserved_since: float = 0.0
    charged: float = 0.0

    def __post_init__(self) -> None:
        """Check that the share lies between 0 and 1."""
        if not 0 < self.budget < 1:
            raise FimprobeError(
                f"schedule budget must be a share of the wall time between 0 and 1, got "
                f'{self.budget!r}. Use schedule={{"budget": 0.02}} for 2 %.'
            )

    def due(self, step: int) -> bool:
        """Return whether a report may happen now."""
        return bool(self.steps) and self._largest() is not None

    def start(self, *, full: bool, loop_seconds: float) -> Extent:
        """Start a measurement; return what it contains, as much as fits."""
        self.running = loop_seconds
        largest = Extent.WHOLE if full else self._largest()
        self.extent = self._next() if largest is None else largest
        return self.extent

    def expected(self, extent: Extent) -> float:
        """Return the expected seconds of a report; 0 for a first one that may cost anything."""
        shortest = min([*self.steps, self.running]) if self.steps else 0.0
        return self.costs.expected(extent, shortest)

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Add the time of one step.

        Args:
            loop_seconds: Time of the training loop.
            probe_seconds: Time of the probe, with figures that :meth:`charge` added already.
        """
        probe_seconds, self.charged = max(0.0, probe_seconds - self.charged), 0.0
        counted = loop_seconds
        # a step below ten times the shortest is below ten times the median: no sorting at every step
        if self.steps and loop_seconds > 10 * min(self.steps):
            counted = min(loop_seconds, 10 * statistics.median(self.steps))
        self.elapsed += counted
        self.steps.append(loop_seconds)
        self.running = math.inf
        self.spent += probe_seconds
        if probe_seconds > 0:
            self._observe_cost(probe_seconds)
        self.num_steps += 1

    def _observe_cost(self, seconds: float) -> None:
        """Record the cost of one measurement, and cover an early one by the allowance."""
        if self.num_steps >= self.next_early:
            self.free += min(seconds, FREE_SECONDS - self.free)
            self.next_early = next_early_step(self.num_steps)
        self.costs.of[self.extent].add(seconds)
        if self.extent is not Extent.PREVIEW:
            self.owes_bounds = self.extent is not self.costs.extents[-1]

    def expect(self, share: float) -> None:
        """Expect later reports to cost a share of the one that runs now, if it is the first."""
        self.costs.of[self.extent].recurring = share

    def can_afford(self, seconds: float) -> bool:
        """Return whether the seconds fit into the share; if not, reserve half of it for them."""
        fits = self._fits(seconds)
        if fits or not self.reserved:
            self.reserved_since = self.elapsed
        self.reserved = 0.0 if fits else seconds
        return fits

    def affordable_steps(self) -> float | None:
        """Return how many of the shortest steps the allowance for early reports covers."""
        return FREE_SECONDS / min(self.steps) if self.steps else None

    def charge(self, seconds: float) -> None:
        """Add seconds of figures, which are not part of the expected cost of a measurement."""
        self.spent += seconds
        self.charged += seconds

    def fail(self, seconds: float) -> None:
        """Charge a measurement that the batch did not allow; the next early step tries again."""
        self.charge(seconds)
        if self.num_steps >= self.next_early:
            self.next_early = next_early_step(self.num_steps)

    def _largest(self) -> Extent | None:
        """Return the largest extent of a report that may happen now; None if none may."""
        is_early = self.num_steps >= self.next_early
        for extent in reversed(self.costs.extents):
            seconds = self.expected(extent)
            uncovered = seconds - self._allowance(extent)
            by_share = self._may_use_share(extent) and self._fits(uncovered + self._reserve())
            if is_early and (uncovered <= 0 or by_share):
                return extent
            in_turn = extent is self.costs.extents[-1] or (
                extent is not Extent.PREVIEW and not self.owes_bounds
            )
            if in_turn and self._fits(seconds + self._reserve()):
                return extent
        return None

    def _may_use_share(self, extent: Extent) -> bool:
        """Return whether the share may pay for what the allowance leaves of an early report.

        Previews are not to delay the first report of more than Î₁ by much.
        """
        if extent is not Extent.PREVIEW or self.costs.has_whole:
            return True
        return self.expected(extent) <= MOST_DELAY * self.expected(self._next())

    def _next(self) -> Extent:
        """Return the extent of the next report that is no early one."""
        whole = [extent for extent in self.costs.extents if extent is not Extent.PREVIEW]
        return whole[-1] if self.owes_bounds else whole[0]

    def _allowance(self, extent: Extent) -> float:
        """Return the seconds of the allowance that an early report may use."""
        is_thrifty = self.costs.has_whole and extent is not self.costs.extents[0]
        return (FREE_SECONDS - self.free) * (SHARE_OF_ALLOWANCE if is_thrifty else 1.0)

    def _reserve(self) -> float:
        return min(self.reserved, self.budget * (self.elapsed - self.reserved_since) / 2)

    def _fits(self, seconds: float) -> bool:
        charged = self.spent - self.free + seconds
        return charged <= self.budget * (self.elapsed + self.spent + seconds)

    def forecast(self, step: int, running: float) -> int:
        """Return the first step after ``step`` at which a measurement will be due.

        Args:
            step: The step that is measured now.
            running: Seconds of that measurement so far, which are not part of ``spent`` yet.
        """
        later = copy.deepcopy(self)
        usual = statistics.median(later.steps) if later.steps else 0.0
        later.observe(loop_seconds=usual, probe_seconds=running)
        wait_for_early = max(0, later.next_early - later.num_steps)
        waits = [later._steps_until_fits(later.expected(later._next()), usual)]
        for extent in later.costs.extents:
            uncovered = later.expected(extent) - later._allowance(extent)
            if uncovered <= 0:
                waits.append(wait_for_early)
            elif later._may_use_share(extent):
                waits.append(max(wait_for_early, later._steps_until_fits(uncovered, usual)))
        return step + 1 + min(waits)

    def _steps_until_fits(self, seconds: float, usual: float) -> int:
        """Return after how many steps so many seconds fit into the share.

        Args:
            seconds: Expected seconds of a report.
            usual: Seconds of a step.
        """
        needed = self.spent + seconds + self._reserve()
        missing = (needed - self.free) / self.budget - needed - self.elapsed
        return math.ceil(missing / usual) if missing > 0 and usual > 0 else 0
