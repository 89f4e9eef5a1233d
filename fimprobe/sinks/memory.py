"""Reports kept in memory."""

from __future__ import annotations

from collections import deque

from fimprobe.report.report import Report


class MemorySink:
    """Keeps the last ``limit`` reports in ``reports``, oldest first."""

    def __init__(self, limit: int = 1000) -> None:
        self.reports: deque[Report] = deque(maxlen=limit)

    def write(self, report: Report) -> None:
        """Store one report; the oldest one is dropped beyond the limit."""
        self.reports.append(report)

    def close(self) -> None:
        """Do nothing: the reports stay readable."""
