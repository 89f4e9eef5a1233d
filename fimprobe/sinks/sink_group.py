"""The sinks of one probe: opened, written to together, dropped if they fail."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fimprobe.config.config import Config
from fimprobe.config.sections import TensorboardConfig
from fimprobe.errors import ErrorHandler
from fimprobe.report.report import Report
from fimprobe.sinks.base import Sink
from fimprobe.sinks.folder_lock import FolderLock
from fimprobe.sinks.jsonl import FILE_NAME, JsonlSink
from fimprobe.sinks.memory import MemorySink
from fimprobe.sinks.trackers import TRACKERS

_REMEDY = "pass another log_dir; reports stay in probe.history"


class SinkGroup:
    """Writes every report to all sinks. A sink that fails is closed and dropped, with one warning.

    Args:
        sinks: Sinks of the user, in addition to the one in memory.
        errors: Treats the errors of sinks.
    """

    def __init__(self, sinks: list[Sink] | None, errors: ErrorHandler) -> None:
        self.memory = MemorySink()
        self.sinks: list[Sink] = [self.memory, *(sinks or [])]
        self._errors = errors
        self._lock: FolderLock | None = None

    def open_files(
        self,
        config: Config,
        *,
        open_tensorboard: Callable[[Path, TensorboardConfig], Sink],
        describe_run: Callable[[], dict[str, Any]],
        purge_step: int | None,
    ) -> Path | None:
        """Open the files that the configuration names.

        Args:
            config: Its options ``tensorboard``, ``jsonl``, ``wandb`` and ``mlflow`` are used.
            open_tensorboard: Returns the sink that writes charts to a folder, from its settings.
            describe_run: Returns what the run measures, for the first line of the JSONL file.
            purge_step: Step at which a training resumes; later records of the file are dropped.

        Returns:
            The folder of the charts, or None if there are none.
        """
        settings, log_dir, has_charts = config.tensorboard, default_log_dir(), False
        if settings:
            log_dir = log_dir if settings.log_dir is None else Path(settings.log_dir)
            has_charts = self._errors.run_safely(
                lambda: self.sinks.append(open_tensorboard(log_dir, settings)),
                f"tensorboard log_dir={str(log_dir)!r} cannot be written ({_REMEDY})",
                key="log_dir",
            )
        if config.jsonl is not False and (settings or config.jsonl):
            path = Path(config.jsonl or log_dir / FILE_NAME)

            def open_jsonl() -> None:
                # the TensorBoard sink holds the lock of the folder; without it, the lines of two
                # writers would be mixed
                if not has_charts and not config.jsonl:
                    self._lock = FolderLock(log_dir, take_over=purge_step is not None)
                try:
                    self.sinks.append(JsonlSink(path, run=describe_run, purge_step=purge_step))
                except BaseException:
                    self._release()
                    raise

            # what prevents charts in log_dir prevents the file there: one warning for both
            self._errors.run_safely(
                open_jsonl,
                f"jsonl={str(path)!r} cannot be written ({_REMEDY})",
                key="jsonl" if config.jsonl else "log_dir",
            )
        for name, open_tracker in TRACKERS.items():
            if getattr(config, name):
                self._errors.run_safely(
                    functools.partial(self._open_tracker, open_tracker, describe_run),
                    f"{name}: true has no effect",
                    key=name,
                )
        return log_dir if has_charts else None

    def _open_tracker(self, open_tracker: Callable[..., Sink], run: Callable[[], Any]) -> None:
        self.sinks.append(open_tracker(run=run))

    def write(self, report: Report) -> None:
        """Write one report to all sinks."""
        self._write_to_all(lambda sink: sink.write(report))

    def write_end(self, reason: str, step: int) -> None:
        """Write why probing ended, or never began, to the sinks that record it.

        Args:
            reason: In words.
            step: Number of the step after the last one.
        """
        self._write_to_all(
            lambda sink: sink.write_end(reason, step) if hasattr(sink, "write_end") else None
        )

    def _write_to_all(self, write: Callable[[Any], None]) -> None:
        """Write to every sink; one that fails is closed and dropped."""
        for sink in list(self.sinks):
            if not self._errors.run_safely(
                functools.partial(write, sink), f"{type(sink).__name__} failed"
            ):
                self.sinks.remove(sink)
                # it keeps no file, thread or lock; that it failed is already known
                if not _closes(sink):
                    _closes(sink)

    def close(self) -> None:
        """Close all sinks and release the folder. Calling it again closes what was not closed.

        Raises:
            FimprobeError: If a sink cannot be closed and errors are to be raised; the others are
                closed nevertheless.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._release)
            stack.callback(self._close_the_rest)
            for sink in self.sinks:
                stack.callback(self._close, sink)

    def _close(self, sink: Sink) -> None:
        """Close a sink; a second time if that fails, since what failed may hold a file or a lock."""
        try:
            failure = f"{type(sink).__name__} could not be closed"
            closed = self._errors.run_safely(sink.close, failure)
        except BaseException:
            _closes(sink)
            raise
        finally:
            if sink in self.sinks:  # another thread may have closed it
                self.sinks.remove(sink)
        if not closed:
            _closes(sink)

    def _close_the_rest(self) -> None:
        """Close the sinks whose turn an error in the probe left out."""
        while self.sinks:
            _closes(self.sinks.pop())

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _closes(sink: Sink) -> bool:
    """Close a sink whose error is known already; return whether it did."""
    try:
        sink.close()
    except Exception:
        return False
    return True


def default_log_dir() -> Path:
    """Return a new folder name below ``runs/fimprobe``, of time and host."""
    return Path("runs/fimprobe") / f"{datetime.now():%Y%m%d-%H%M%S-%f}_{socket.gethostname()}"
