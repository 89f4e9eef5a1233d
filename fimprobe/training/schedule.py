"""When to probe: every n steps, at given steps, or within a share of the wall time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from fimprobe.errors import FimprobeError


class Schedule:
    """Decides when to measure, and is told what the loop and the probe cost."""

    def due(self, step: int) -> bool:
        """Whether to probe at this optimizer step."""
        raise NotImplementedError

    def begin(self, *, whole: bool) -> bool:
        """A measurement begins, wanted ``whole`` or not; whether it is a first look."""
        return False

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Take in the time of one step: the loop's own, and the probe's."""

    def can_afford(self, seconds: float) -> bool:
        """Whether pictures may take so many seconds now; if not, that they are wanted is noted."""
        return True

    def charge(self, seconds: float) -> None:
        """What pictures took of the step at hand."""


@dataclass
class Every(Schedule):
    """At steps 0, n, 2n, ...

    >>> [step for step in range(7) if Every(3).due(step)]
    [0, 3, 6]
    """

    every: int

    def __post_init__(self) -> None:
        """Check n."""
        if isinstance(self.every, bool) or self.every < 1:
            raise FimprobeError(f"schedule every={self.every!r}: pass a number of steps from 1")

    def due(self, step: int) -> bool:
        """Whether n divides the step."""
        return step % self.every == 0


@dataclass
class At(Schedule):
    """At the listed steps."""

    at: list[int]

    def __post_init__(self) -> None:
        """Asked several times a step: the list may be long."""
        self._steps = frozenset(self.at)

    def due(self, step: int) -> bool:
        """Whether the step is listed."""
        return step in self._steps


LOOKS = 2
"""First looks of a staged budget: the first pays for imports and checks, the second does not."""

FULL_TO_PREVIEW_COST = 15.0
"""Times that a measurement is expected to cost a look, before there was one (5 to 20 were seen)."""


@dataclass
class Budget(Schedule):
    """As often as the probe's share of the wall time stays at or under ``budget``.

    A probe is due when what was spent, plus what the next one is expected to cost (the dearest of
    the last few), fits into the share of the time so far. The first probe, which also verifies the
    model, has nothing to fit into: it is made at the second step and paid off afterwards. Where a
    look at Î₁ costs far less than all that is asked for (``staged``), the first two are such looks,
    and the whole follows when there is room for it. Pauses of the loop (evaluation, checkpoints)
    earn no more than ten usual steps. Pictures are drawn where there is room; half of the share is
    laid aside for them.
    """

    budget: float
    staged: bool = False
    spent: float = 0.0
    elapsed: float = 0.0
    looks: list[float] = field(default_factory=list)
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    first: float | None = None
    looking: bool = False
    saving: float = 0.0
    since: float = 0.0
    charged: float = 0.0

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 < self.budget < 1:
            raise FimprobeError(
                f"schedule budget={self.budget!r}: pass a share of wall time between 0 and 1"
            )

    def due(self, step: int) -> bool:
        """Whether the next probe fits."""
        if self.first is None:
            return bool(self.steps)
        return self._fits(self._expected(self.first, self.looks) + self._reserve())

    def begin(self, *, whole: bool) -> bool:
        """Whether it is one of the first looks."""
        known = self.costs or (self.first is not None and not self.looks)
        self.looking = self.staged and not (whole or known) and len(self.looks) < LOOKS
        return self.looking

    def _expected(self, first: float, looks: list[float]) -> float:
        """What the next measurement costs, where the first one cost ``first``."""
        if self.costs:
            return max(self.costs)
        return FULL_TO_PREVIEW_COST * looks[-1] if len(looks) == LOOKS else first

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Add one step to the account."""
        probe_seconds, self.charged = max(0.0, probe_seconds - self.charged), 0.0
        counted = loop_seconds
        # no sorting at every step: what is no pause beside the shortest is none beside the median
        if self.steps and loop_seconds > 10 * min(self.steps):
            counted = min(loop_seconds, 10 * statistics.median(self.steps))
        self.elapsed += counted
        self.steps.append(loop_seconds)
        self.spent += probe_seconds
        if probe_seconds > 0:
            if self.looking:
                self.looks.append(probe_seconds)
            elif self.first is not None:
                self.costs.append(probe_seconds)
            self.first = probe_seconds if self.first is None else self.first

    def can_afford(self, seconds: float) -> bool:
        """Whether they stay within the share; if not, half of it is laid aside for them."""
        fits = self._fits(seconds)
        if fits or not self.saving:
            self.since = self.elapsed
        self.saving = 0.0 if fits else seconds
        return fits

    def charge(self, seconds: float) -> None:
        """On the account, and no part of what a measurement is expected to cost."""
        self.spent += seconds
        self.charged += seconds

    def _reserve(self) -> float:
        return min(self.saving, self.budget * (self.elapsed - self.since) / 2)

    def _fits(self, seconds: float) -> bool:
        return self.spent + seconds <= self.budget * (self.elapsed + self.spent + seconds)

    def forecast(self, step: int, running: float) -> int:
        """The first step after ``step`` at which a probe will be due, if steps stay as long.

        ``running``: seconds of the probe at ``step``, which no account holds yet.
        """
        if self.looking:
            expected = self._expected(running, [*self.looks, running])
        else:
            expected = running if self.first is None else max([*self.costs, running])
        needed = (self.spent + running + expected + self._reserve()) * (1 - self.budget) / self.budget
        usual = statistics.median(self.steps) if self.steps else 0.0
        missing = needed - self.elapsed
        return step + 1 + (math.ceil(missing / usual) if missing > 0 and usual > 0 else 0)


@dataclass
class SharedBudget(Schedule):
    """A budget of several processes: after each probe they settle on the step of the next.

    Each keeps its own account; :meth:`forecast` of one of them, told to all, is what counts.
    """

    account: Budget
    next: int = 1

    def begin(self, *, whole: bool) -> bool:
        """The same in all processes, which have measured alike."""
        return self.account.begin(whole=whole)

    def can_afford(self, seconds: float) -> bool:
        """What this process's account says."""
        return self.account.can_afford(seconds)

    def charge(self, seconds: float) -> None:
        """On this process's account."""
        self.account.charge(seconds)

    def due(self, step: int) -> bool:
        """Whether the step settled on is reached."""
        return step >= self.next

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Add one step to the account."""
        self.account.observe(loop_seconds=loop_seconds, probe_seconds=probe_seconds)

    def forecast(self, step: int, running: float) -> int:
        """What this process's account says."""
        return self.account.forecast(step, running)
