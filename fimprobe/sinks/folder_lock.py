"""One writer for a folder: a lock that ends with its process, so that a crash blocks nobody."""

from __future__ import annotations

import os
from pathlib import Path

from fimprobe.errors import FimprobeError

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not detected there
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "fimprobe.lock"


_held_locks: dict[Path, FolderLock] = {}
"""The locks of this process, by resolved folder."""


class FolderLock:
    """Holds a folder until ``release`` or the end of the process.

    The file stays; what counts is the system's lock on it, which no dead process holds.

    Args:
        folder: The folder to write to; it is made if missing.
        take_over: Whether to end the lock of another writer of this process, which was left open. A
            training that failed in a notebook and resumes there is such a writer.

    Raises:
        FimprobeError: If another probe holds the folder.
    """

    def __init__(self, folder: str | Path, *, take_over: bool = False) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._path = path.resolve()
        previous = _held_locks.get(self._path)
        if take_over and previous is not None:
            previous.release()
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
        """Whether this lock still holds the folder."""
        return not self._file.closed

    def release(self) -> None:
        """Release the folder. Calling it again does nothing."""
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
                f"`log_dir` must be a folder of its own, but {str(self._path)!r} is being written by "
                f"another probe (process {owner}). Call detach() on that one, or pass another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
