"""JSON lines: one object that describes the run, then one for each report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fimprobe.report.report import Report

FILE_NAME = "fimprobe.jsonl"


class JsonlSink:
    """Appends reports to a file; every line is on disk when ``write`` returns.

    Args:
        path: The file; folders are made.
        run: Returns what is measured and how. It is called at the first report and written before
            it, as ``{"run": {"first_step": ..., ...}}``.
        purge_step: Step at which a training resumes. Lines of this step and later ones are dropped
            first, and the resumed run begins with another ``run`` line.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        run: Callable[[], dict[str, Any]] | None = None,
        purge_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._run = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if purge_step is not None and self.path.exists():
            self._purge(purge_step)
        self.file = self.path.open("a")

    def write(self, report: Report) -> None:
        """Append one report."""
        text = json.dumps(report.to_dict(), allow_nan=False, default=float) + "\n"
        if self._run is not None:  # not before the first report: a run without reports has no line
            description = {"run": {"first_step": report.step} | self._run()}
            text = json.dumps(description, allow_nan=False, default=str) + "\n" + text
            self._run = None
        self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _purge(self, step: int) -> None:
        """Drop the records of ``step`` and later ones."""
        kept = self.path.with_name(self.path.name + ".rest")
        with kept.open("w") as file:
            file.writelines(
                json.dumps(record) + "\n" for record in _records(self.path) if _step(record) < step
            )
        kept.replace(self.path)  # atomic: a crash here loses no line


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records up to a line that is torn, as a killed process leaves it."""
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _step(record: dict[str, Any]) -> int:
    """Return the step of a report, or the first step of a run."""
    return int(record["run"]["first_step"] if "run" in record else record["step"])
