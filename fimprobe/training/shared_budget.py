"""A share of the wall time that several processes keep together."""

from __future__ import annotations

from dataclasses import dataclass

from fimprobe.training.report_costs import Extent
from fimprobe.training.schedule import Budget, Schedule


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

    def start(self, *, full: bool, loop_seconds: float) -> Extent:
        """Start a measurement; return what it contains by this process's account."""
        return self.account.start(full=full, loop_seconds=loop_seconds)

    def agree(self, extent: Extent) -> Extent:
        """Start the measurement that all processes agreed on; return what it contains."""
        self.account.extent = extent
        return extent

    def expect(self, share: float) -> None:
        """Expect later measurements to cost a share of the one that runs now, if it is the first."""
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
