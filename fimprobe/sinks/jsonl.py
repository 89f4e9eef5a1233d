"""One JSON object a report, one report a line: the complete record that ``fimprobe show`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fimprobe.report import Report
from fimprobe.types import FimprobeError

FILE_NAME = "fimprobe.jsonl"


class JsonlSink:
    """Appends to ``path``; every line is on disk when ``write`` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a")

    def write(self, report: Report) -> None:
        """Append one report."""
        self.file.write(json.dumps(report.to_dict(), allow_nan=False, default=float) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_jsonl(run: str | Path) -> list[dict[str, Any]]:
    """The reports of a run directory or a .jsonl file, a torn last line left out."""
    path = Path(run)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FimprobeError(
            f"run={str(run)!r} holds no {FILE_NAME}; pass the directory that attach() printed"
        )
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
