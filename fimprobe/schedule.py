"""When to probe: every n steps, at given steps, or within a share of the wall time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from fimprobe.types import FimprobeError


class Schedule(Protocol):
    """Decides, and is told what the loop and the probe cost."""

    def due(self, step: int) -> bool:
        """Whether to probe at this optimizer step."""

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Take in the time of one step: the loop's own, and the probe's."""

    def affords(self, seconds: float) -> bool:
        """Whether the probe may take so many seconds more."""


@dataclass
class Every:
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

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Costs do not matter here."""

    def affords(self, seconds: float) -> bool:
        """Costs do not matter here."""
        return True


@dataclass
class At:
    """At the listed steps."""

    at: list[int]

    def __post_init__(self) -> None:
        """Asked several times a step: the list may be long."""
        self._steps = frozenset(self.at)

    def due(self, step: int) -> bool:
        """Whether the step is listed."""
        return step in self._steps

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Costs do not matter here."""

    def affords(self, seconds: float) -> bool:
        """Costs do not matter here."""
        return True


@dataclass
class Budget:
    """As often as the probe's share of the wall time stays at or under ``budget``.

    A probe is due when what was spent, plus what the next one is expected to cost (the dearest of
    the last few), fits into the share of the time so far. The first probe, which also verifies the
    model, has nothing to fit into: it is made at the second step and paid off afterwards. Pauses
    of the loop (evaluation, checkpoints) earn no more than ten usual steps.
    """

    budget: float
    spent: float = 0.0
    elapsed: float = 0.0
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    first: float | None = None

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
        return self.affords(max(self.costs) if self.costs else self.first)

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Add one step to the account."""
        counted = loop_seconds
        # no sorting at every step: what is no pause beside the shortest is none beside the median
        if self.steps and loop_seconds > 10 * min(self.steps):
            counted = min(loop_seconds, 10 * statistics.median(self.steps))
        self.elapsed += counted
        self.steps.append(loop_seconds)
        self.spent += probe_seconds
        if probe_seconds > 0:
            if self.first is None:
                self.first = probe_seconds
            else:
                self.costs.append(probe_seconds)

    def affords(self, seconds: float) -> bool:
        """Whether so many seconds more stay within the share."""
        return self.spent + seconds <= self.budget * (self.elapsed + self.spent + seconds)

    def forecast(self, step: int, running: float) -> int:
        """The first step after ``step`` at which a probe will be due, if steps stay as long.

        ``running``: seconds of the probe at ``step``, which no account holds yet.
        """
        expected = running if self.first is None else max([*self.costs, running])
        needed = (self.spent + running + expected) * (1 - self.budget) / self.budget
        usual = statistics.median(self.steps) if self.steps else 0.0
        missing = needed - self.elapsed
        return step + 1 + (math.ceil(missing / usual) if missing > 0 and usual > 0 else 0)


@dataclass
class Agreed:
    """A budget of several processes: after each probe they settle on the step of the next.

    Each keeps its own account; :meth:`forecast` of one of them, told to all, is what counts.
    """

    account: Budget
    next: int = 1

    def affords(self, seconds: float) -> bool:
        """What this process's account says."""
        return self.account.affords(seconds)

    def due(self, step: int) -> bool:
        """Whether the step settled on is reached."""
        return step >= self.next

    def observe(self, *, loop_seconds: float, probe_seconds: float) -> None:
        """Add one step to the account."""
        self.account.observe(loop_seconds=loop_seconds, probe_seconds=probe_seconds)

    def forecast(self, step: int, running: float) -> int:
        """What this process's account says."""
        return self.account.forecast(step, running)
