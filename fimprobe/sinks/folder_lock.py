"""One writer a folder: a lock that ends with its process, so a crash leaves nothing in the way."""

from __future__ import annotations

import os
from pathlib import Path

from fimprobe.errors import FimprobeError

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not noticed there
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "fimprobe.lock"


_held_locks: dict[Path, FolderLock] = {}
"""The folders that this process holds."""


class FolderLock:
    """Holds ``folder`` until ``release`` or the end of the process; ``held`` tells whether it does.

    The file stays; what counts is the system's lock on it, which no dead process holds.
    ``take_over``: of a writer of this process that was left open, as by a training that failed in a
    notebook and resumes there; that one is then no longer ``held``.

    Raises:
        FimprobeError: where another probe holds the folder.
    """

    def __init__(self, folder: str | Path, *, take_over: bool = False) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._path = path.resolve()
        before = _held_locks.get(self._path)
        if take_over and before is not None:
            before.release()
        self._file = (path / FILE_NAME).open("a+")
        try:
            self._acquire()
        except BaseException:
            self._file.close()
            raise
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        _held_locks[self._path] = self

    @property
    def held(self) -> bool:
        """Whether the folder is still this one's to write to."""
        return not self._file.closed

    def release(self) -> None:
        """Let go; doing so again does nothing."""
        if self.held:
            self._file.close()
            _held_locks.pop(self._path, None)

    def _acquire(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            raise FimprobeError(
                f"log_dir={str(self._path)!r} is being written by another probe (process {owner}); "
                "two writers would mix their charts: detach() that one, or pass another log_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
