"""The protocol of a sink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fimprobe.report.report import Report


class Sink(Protocol):
    """Takes reports: TensorBoard, a file, memory, or a user's own."""

    def write(self, report: Report) -> None:
        """Store one report."""

    def close(self) -> None:
        """Flush and let go."""
