"""The protocol of sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fimprobe.report.report import Report


class Sink(Protocol):
    """A destination of reports: TensorBoard, a file, memory, or a custom one."""

    def write(self, report: Report) -> None:
        """Store one report."""

    def close(self) -> None:
        """Flush, and release files and locks."""
