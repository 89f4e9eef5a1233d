"""One JSON object a report, one report a line: the complete record that ``fimprobe show`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fimprobe.report import Report
from fimprobe.types import FimprobeError

FILE_NAME = "fimprobe.jsonl"


class JsonlSink:
    """Appends to ``path``; every line is on disk when ``write`` returns.

    ``purge_step``: where a training resumes; lines of this step and later ones are dropped first.
    """

    def __init__(self, path: str | Path, *, purge_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if purge_step is not None and self.path.exists():
            self._purge(purge_step)
        self.file = self.path.open("a")

    def write(self, report: Report) -> None:
        """Append one report."""
        self.file.write(json.dumps(report.to_dict(), allow_nan=False, default=float) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _purge(self, step: int) -> None:
        rest = self.path.with_name(self.path.name + ".rest")
        with rest.open("w") as file:
            file.writelines(
                json.dumps(record) + "\n" for record in _records(self.path) if record["step"] < step
            )
        rest.replace(self.path)  # at once: a crash here loses no line


def read_jsonl(run: str | Path) -> list[dict[str, Any]]:
    """The reports of a run directory or a .jsonl file, a torn last line left out."""
    path = Path(run)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FimprobeError(
            f"run={str(run)!r} holds no {FILE_NAME}; pass the directory that attach() printed"
        )
    return list(_records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
