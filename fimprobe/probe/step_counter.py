"""The number of optimizer steps, of which a device may not have decided yet which are made."""

from __future__ import annotations

from typing import Any

from fimprobe.training.schedule import Schedule
from fimprobe.training.skipped_steps import SkippedSteps


class StepCounter:
    """Counts optimizer steps, without those that GradScaler skips.

    Args:
        first_step: Number of the first step.

    Attributes:
        upper_bound: The count if no step was skipped whose answer is still on the device.
    """

    def __init__(self, first_step: int) -> None:
        self.upper_bound = first_step
        self._skipped = SkippedSteps()

    @property
    def has_unread_skips(self) -> bool:
        """Whether the device knows of steps that may have been skipped."""
        return bool(self._skipped)

    def read(self) -> int:
        """Return the exact count; waits for the device if there are unread skips."""
        if self._skipped:
            self.upper_bound -= self._skipped.count()
        return self.upper_bound

    def set(self, number: int) -> None:
        """Replace the count, as by that of the loop."""
        self.upper_bound = number
        self._skipped.clear()

    def record_skip(self, found_inf: Any, *, same: bool) -> None:
        """Store whether the next step is skipped, without waiting for the device.

        Args:
            found_inf: Flag, not zero if the step is skipped; None if it is never skipped.
            same: Whether it counts as one step with the previous one, whose batch it uses.
        """
        self._skipped.record(found_inf, same=same)

    def is_due(self, schedule: Schedule) -> bool:
        """Return whether the next step is due; waits for the device only if it could be."""
        if not schedule.due(self.upper_bound):
            return False
        return not self._skipped or schedule.due(self.read())
