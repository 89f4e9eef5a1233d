"""Reports kept in memory."""

from __future__ import annotations

from collections import deque

from fimprobe.report.report import Report


class MemorySink:
    """The last ``limit`` reports, oldest first."""

    def __init__(self, limit: int = 1000) -> None:
        self.reports: deque[Report] = deque(maxlen=limit)

    def write(self, report: Report) -> None:
        """Keep one report."""
        self.reports.append(report)

    def close(self) -> None:
        """Nothing to let go."""
