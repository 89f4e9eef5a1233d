"""Schedules of measurements: every n steps, at given steps, or within a share of the wall time."""

from __future__ import annotations

import copy
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

    def affordable_steps(self) -> float | None:
        """Return how many steps of the loop one report may cost; None for any number."""
        return None

    def charge(self, seconds: float) -> None:
        """Record the seconds that figures used during the current step."""

    def expect(self, share: float) -> None:
        """Expect later measurements to cost a share of the first whole one, which runs now."""

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

WHOLE_TO_STEP_COST = 15.0
"""Expected seconds of the first whole report, in steps of the loop (14 to 19 measured where a step
takes long enough for it to matter)."""


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
    its expected cost fits into what is left of ``FREE_SECONDS``. The first happens in any case. Other
    measurements are due when the seconds charged so far plus the expected cost of the next one fit
    into the share of the elapsed time. The expected cost is the largest of the last few, without the
    very first, which also verifies the model; after that one alone, ``recurring`` of it. With
    ``staged``, early reports are previews of Î₁ alone as long as a whole report is expected to
    exceed the allowance. A pause of the loop (evaluation, checkpoint) counts as ten usual steps at
    most. Half of the share is reserved for figures that are waiting.

    Attributes:
        budget: Share of the wall time, between 0 and 1.
        staged: Whether whole reports cost far more than those of Î₁, so that previews may come first.
        spent: Seconds that the probe used.
        free: Those of them that the allowance covers.
        elapsed: Seconds of the loop, long pauses shortened.
        num_steps: Steps so far.
        next_early: The number of the step of the next early report.
        preview_seconds: Seconds of the last preview; 0 without one.
        first: Seconds of the first whole report; None without one.
        recurring: Share of them that later ones are expected to take.
        costs: Seconds of the last whole reports, without the first.
        steps: Seconds of the last steps of the loop.
        previewing: Whether the measurement at hand is a preview.
        reserved: Seconds that waiting figures need.
        reserved_since: ``elapsed`` when they began to wait.
        charged: Seconds of figures in the current step, already part of ``spent``.
    """

    budget: float
    _: KW_ONLY
    staged: bool = False
    spent: float = 0.0
    free: float = 0.0
    elapsed: float = 0.0
    num_steps: int = 0
    next_early: int = 1
    preview_seconds: float = 0.0
    first: float | None = None
    recurring: float = 1.0
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
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
        """Return whether the next report, or a preview in its place, may happen now."""
        return bool(self.steps) and (self._whole_fits() or self._preview_fits())

    def start(self, *, full: bool) -> bool:
        """Start a measurement; return whether it is a preview."""
        self.previewing = self.staged and not full and self.first is None and not self._whole_fits()
        return self.previewing

    @property
    def expected(self) -> float:
        """Expected seconds of the next whole report; 0 for a first one that may cost anything."""
        if self.costs:
            return max(self.costs)
        if self.first is not None:
            return self.first * self.recurring
        return WHOLE_TO_STEP_COST * min(self.steps) if self.staged and self.steps else 0.0

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
            self._observe_cost(probe_seconds)
        self.num_steps += 1

    def _observe_cost(self, seconds: float) -> None:
        """Record the cost of one measurement, and cover an early one by the allowance."""
        if self.num_steps >= self.next_early:
            self.free += min(seconds, FREE_SECONDS - self.free)
            self.next_early = next_early_step(self.num_steps)
        if self.previewing:
            self.preview_seconds = seconds
        elif self.first is None:
            self.first = seconds
        else:
            self.costs.append(seconds)

    def expect(self, share: float) -> None:
        """Expect later reports to cost a share of the first whole one, which runs now."""
        self.recurring = share

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

    def _whole_fits(self) -> bool:
        """Return whether a whole report fits into the allowance or into the share."""
        return self._is_free(self.expected) or self._fits(self.expected + self._reserve())

    def _preview_fits(self) -> bool:
        """Return whether a preview may take the place of an early report that is too expensive."""
        return self.staged and self.first is None and self._is_free(self.preview_seconds)

    def _is_free(self, seconds: float) -> bool:
        return self.num_steps >= self.next_early and self.free + seconds <= FREE_SECONDS

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
        needed = later.spent + later.expected + later._reserve()
        missing = (needed - later.free) / later.budget - needed - later.elapsed
        waits = [math.ceil(missing / usual) if missing > 0 and usual > 0 else 0]
        wait_for_early = max(0, later.next_early - later.num_steps)
        later.num_steps += wait_for_early
        if later._is_free(later.expected) or later._preview_fits():
            waits.append(wait_for_early)
        return step + 1 + min(waits)


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
        """Start a measurement; return whether this process's account asks for a preview."""
        return self.account.start(full=full)

    def agree(self, preview: bool) -> bool:
        """Start the measurement that all processes agreed on; return whether it is a preview."""
        self.account.previewing = preview
        return preview

    def expect(self, share: float) -> None:
        """Expect later measurements to cost a share of the first whole one, which runs now."""
        self.account.expect(share)

    def fail(self, seconds: float) -> None:
        """Charge a measurement that the batch did not allow to this process's account."""
        self.account.fail(seconds)

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
