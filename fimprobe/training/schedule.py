"""Schedules of measurements: every n steps, at given steps, or within a share of the wall time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import KW_ONLY, dataclass, field

from fimprobe.errors import FimprobeError


class Schedule:
    """Decides when to measure, from the times that the loop and the probe need."""

    def due(self, step: int) -> bool:
        """Return whether to measure at this optimizer step."""
        raise NotImplementedError

    def start(self, *, full: bool) -> bool:
        """Start a measurement; return whether it is a preview.

        Args:
            full: Whether a preview is ruled out.
        """
        return False

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Record the time of one step.

        Args:
            loop_seconds: Time of the training loop.
            probe_seconds: Time of the probe.
        """

    def can_afford(self, seconds: float) -> bool:
        """Return whether figures may use so many seconds now; if not, reserve time for them."""
        return True

    def charge(self, seconds: float) -> None:
        """Record the seconds that figures used during the current step."""


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


NUM_PREVIEWS = 2
"""Previews of a staged budget: the first includes imports and checks, the second does not."""

FULL_TO_PREVIEW_COST = 15.0
"""Expected cost of the first full measurement, in previews (5 to 20 measured on small models)."""


@dataclass
class Budget(Schedule):
    """Measurements as often as the probe's share of the wall time permits.

    A measurement is due when the seconds spent plus the expected cost of the next one fit into the
    share of the elapsed time. The expected cost is the largest of the last few. The first
    measurement also verifies the model; it happens at the second step and is paid off afterwards.
    With ``staged`` the first two are previews, which measure Î₁ only, and the full measurement
    follows when the budget covers it. A pause of the loop (evaluation, checkpoint) counts as ten
    usual steps at most. Half of the share is reserved for figures that are waiting.

    Attributes:
        budget: Share of the wall time, between 0 and 1.
        staged: Whether full measurements cost far more than those of Î₁, so that previews come first.
        spent: Seconds that the probe used.
        elapsed: Seconds of the loop, long pauses shortened.
        preview_costs: Seconds of each preview.
        costs: Seconds of the last full measurements, without the very first measurement.
        steps: Seconds of the last steps of the loop.
        first: Seconds of the very first measurement.
        previewing: Whether the measurement at hand is a preview.
        reserved: Seconds that waiting figures need.
        reserved_since: ``elapsed`` when they began to wait.
        charged: Seconds of figures in the current step, already part of ``spent``.
    """

    budget: float
    _: KW_ONLY
    staged: bool = False
    spent: float = 0.0
    elapsed: float = 0.0
    preview_costs: list[float] = field(default_factory=list)
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    first: float | None = None
    previewing: bool = False
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
        """Return whether the next measurement fits into the share."""
        if self.first is None:
            return bool(self.steps)
        return self._fits(self._expected(self.first, self.preview_costs) + self._reserve())

    def start(self, *, full: bool) -> bool:
        """Start a measurement; return whether it is one of the first previews."""
        known = self.costs or (self.first is not None and not self.preview_costs)
        remaining = len(self.preview_costs) < NUM_PREVIEWS
        self.previewing = self.staged and not (full or known) and remaining
        return self.previewing

    def _expected(self, first: float, preview_costs: list[float]) -> float:
        """Return the expected seconds of the next measurement.

        Args:
            first: Seconds of the very first measurement.
            preview_costs: Seconds of each preview.
        """
        if self.costs:
            return max(self.costs)
        if len(preview_costs) == NUM_PREVIEWS:
            return FULL_TO_PREVIEW_COST * preview_costs[-1]
        return first

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
        self.spent += probe_seconds
        if probe_seconds > 0:
            if self.previewing:
                self.preview_costs.append(probe_seconds)
            elif self.first is not None:
                self.costs.append(probe_seconds)
            self.first = probe_seconds if self.first is None else self.first

    def can_afford(self, seconds: float) -> bool:
        """Return whether the seconds fit into the share; if not, reserve half of it for them."""
        fits = self._fits(seconds)
        if fits or not self.reserved:
            self.reserved_since = self.elapsed
        self.reserved = 0.0 if fits else seconds
        return fits

    def charge(self, seconds: float) -> None:
        """Add seconds of figures, which are not part of the expected cost of a measurement."""
        self.spent += seconds
        self.charged += seconds

    def _reserve(self) -> float:
        return min(self.reserved, self.budget * (self.elapsed - self.reserved_since) / 2)

    def _fits(self, seconds: float) -> bool:
        return self.spent + seconds <= self.budget * (self.elapsed + self.spent + seconds)

    def forecast(self, step: int, running: float) -> int:
        """Return the first step after ``step`` at which a measurement will be due.

        Args:
            step: The step that is measured now.
            running: Seconds of that measurement so far, which are not part of ``spent`` yet.
        """
        if self.previewing:
            expected = self._expected(running, [*self.preview_costs, running])
        else:
            expected = running if self.first is None else max([*self.costs, running])
        needed = (self.spent + running + expected + self._reserve()) * (1 - self.budget) / self.budget
        usual = statistics.median(self.steps) if self.steps else 0.0
        missing = needed - self.elapsed
        return step + 1 + (math.ceil(missing / usual) if missing > 0 and usual > 0 else 0)


@dataclass
class SharedBudget(Schedule):
    """A budget shared by several processes, which agree on the step of the next measurement.

    Each process keeps its own account. The :meth:`forecast` of one process is sent to all.

    Attributes:
        account: The budget of this process.
        next: The step of the next measurement.
    """

    account: Budget
    next: int = 1

    def start(self, *, full: bool) -> bool:
        """Start a measurement; all processes return the same, because they measured the same."""
        return self.account.start(full=full)

    def can_afford(self, seconds: float) -> bool:
        """Return whether the seconds fit into the share of this process."""
        return self.account.can_afford(seconds)

    def charge(self, seconds: float) -> None:
        """Add seconds of figures to this process's account."""
        self.account.charge(seconds)

    def due(self, step: int) -> bool:
        """Return whether the agreed step is reached."""
        return step >= self.next

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Add the time of one step to this process's account.

        Args:
            loop_seconds: Time of the training loop.
            probe_seconds: Time of the probe.
        """
        self.account.observe(loop_seconds=loop_seconds, probe_seconds=probe_seconds)

    def forecast(self, step: int, running: float) -> int:
        """Return the step of the next measurement according to this process's account.

        Args:
            step: The step that is measured now.
            running: Seconds of that measurement so far.
        """
        return self.account.forecast(step, running)
