"""One JSON object a line: what a run is, then its reports; what ``fimprobe show`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fimprobe.report.report import Report

FILE_NAME = "fimprobe.jsonl"


class JsonlSink:
    """Appends to ``path``; every line is on disk when ``write`` returns.

    ``run`` tells what is measured and how; asked at the first report, it gets the line before it,
    ``{"run": {"first_step": ..., ...}}``. ``purge_step``: where a training resumes; lines of this
    step and later ones are dropped first, and the resumed run gets a ``run`` line of its own.
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
        if self._run is not None:  # together with the report: a run without one is none
            about = {"run": {"first_step": report.step} | self._run()}
            text = json.dumps(about, allow_nan=False, default=str) + "\n" + text
            self._run = None
        self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _purge(self, step: int) -> None:
        rest = self.path.with_name(self.path.name + ".rest")
        with rest.open("w") as file:
            file.writelines(
                json.dumps(record) + "\n" for record in _records(self.path) if _step(record) < step
            )
        rest.replace(self.path)  # at once: a crash here loses no line


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _step(record: dict[str, Any]) -> int:
    """A report's step; of a run's line the first one it speaks of."""
    return int(record["run"]["first_step"] if "run" in record else record["step"])
