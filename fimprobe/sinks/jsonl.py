"""JSON lines: one object that describes the run, one for each report, one for what ended it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fimprobe.config.config import JSONL_NAME
from fimprobe.errors import FimprobeError
from fimprobe.report.report import Report, shared_record
from fimprobe.sinks.appended_file import AppendedFile
from fimprobe.sinks.folder_lock import FileLock

FILE_NAME = JSONL_NAME


class JsonlSink:
    """Appends reports to a file; every line is on disk when ``write`` returns.

    Args:
        path: The file; folders are made.
        run: Returns what is measured and how. It is called at the first report and written before
            it, as ``{"run": {"first_step": ..., ...}}``.
        purge_step: Step at which a training resumes. Lines of this step and later ones are dropped
            first, and the resumed run begins with another ``run`` line. A sink that this process
            left open on the file is closed.

    Raises:
        FimprobeError: If another probe writes to the file, or it cannot be appended to.
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
        if self.path.is_fifo():  # opening it would wait for a reader, without end
            raise FimprobeError(f"`jsonl` must be a file, got {str(self.path)!r}, which is a pipe.")
        self._lock = FileLock(self.path, option="jsonl", take_over=purge_step is not None)
        try:
            if purge_step is not None and self.path.is_file():
                self._purge(purge_step)
                self._lock.release()  # the file is a new one
                self._lock = FileLock(self.path, option="jsonl")
            self._is_torn = _is_torn(self.path)
            self._file = AppendedFile(self.path)
        except BaseException:
            self._lock.release()
            raise

    def write(self, report: Report) -> None:
        """Append one report.

        Raises:
            FimprobeError: If a resumed training writes to the file now, or this process is a fork of
                the one that writes.
        """
        text = json.dumps(shared_record(report), allow_nan=False, default=float) + "\n"
        if self._run is not None:  # not before the first report: a run without reports has no line
            description = {"run": {"first_step": report.step} | self._run()}
            text = json.dumps(description, allow_nan=False, default=str) + "\n" + text
        self._append(text)
        self._run = None

    def write_end(self, reason: str, step: int) -> None:
        """Append ``{"end": ...}``: why probing ended before the training, or never began.

        Args:
            reason: In words.
            step: Number of the step after the last one.

        Raises:
            FimprobeError: As :meth:`write`.
        """
        self._append(json.dumps({"end": {"step": step, "reason": reason}}) + "\n")

    def _append(self, text: str) -> None:
        """Append lines.

        Raises:
            FimprobeError: If the file is not this sink's any more.
        """
        if not self._lock.held:
            raise FimprobeError("another training or process writes to this file now")
        if self._is_torn:  # a line appended to a torn one would be lost with it
            text = "\n" + text
        self._file.append(text.encode())
        self._is_torn = False

    def close(self) -> None:
        """Close the file and release it."""
        try:
            self._file.close()
        finally:
            self._lock.release()

    def _purge(self, step: int) -> None:
        """Drop the records of ``step`` and later ones."""
        # a new file with a random name: a file or a link of a fixed name may lie there
        descriptor, name = tempfile.mkstemp(prefix=self.path.name + ".", dir=self.path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(record) + "\n"
                    for record in _records(self.path)
                    if _step(record) < step
                )
            shutil.copymode(self.path, name)
            Path(name).replace(self.path)  # atomic: a crash here loses no line
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


def _is_torn(path: Path) -> bool:
    """Return whether the last line of a file has no end, as a killed process leaves it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file without its damaged lines.

    Raises:
        FimprobeError: If no line is a record: fimprobe did not write this file.
    """
    lines = records = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            lines += bool(line.strip())
            try:
                record = json.loads(line)
                _step(record)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue
            records += 1
            yield record
    if lines > 1 and not records:  # a single line may be the torn first one
        raise FimprobeError(
            f"`jsonl` must be a new file or one that fimprobe wrote, got {str(path)!r}, which has no "
            "report. Pass another file."
        )


def _step(record: dict[str, Any]) -> int:
    """Return the step of a report or of an end, or the first step of a run."""
    if "end" in record:
        return int(record["end"]["step"])
    return int(record["run"]["first_step"] if "run" in record else record["step"])
