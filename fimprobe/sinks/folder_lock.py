"""One writer for a folder or a file: a lock that ends with its process; a crash blocks nobody."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from fimprobe.errors import FimprobeError

try:
    import fcntl
except ImportError:  # Windows has no flock: writers of other processes are not detected there
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "fimprobe.lock"

_MAX_PID_BYTES = 32
"""Bytes read of a lock's file: a process id has at most 20 digits, by 64 bits."""


_held_locks: dict[Path, FileLock] = {}
"""The locks of this process, by resolved path."""


class FileLock:
    """Holds a file until ``release`` or the end of the process.

    What counts is the system's lock on the file, which no dead process holds. The file is made if
    missing, and its contents do not change. A fork of the process holds nothing.

    Args:
        path: The file. The lock of a link is that of its target.
        option: The option that the file belongs to, for messages.
        take_over: Whether to end the lock of another writer of this process, which was left open. A
            training that failed in a notebook and resumes there is such a writer.

    Raises:
        FimprobeError: If another probe holds the file.
    """

    def __init__(self, path: str | Path, *, option: str, take_over: bool = False) -> None:
        self._path, self._option = Path(path).resolve(), option
        self._descriptor: int | None = None
        previous = _held_locks.get(self._path)
        if previous is not None:
            if not take_over:
                raise self._held_elsewhere(str(os.getpid()))
            previous.release()
        self._descriptor = self._open(Path(path))
        try:
            self._acquire()
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        _held_locks[self._path] = self

    @property
    def held(self) -> bool:
        """Whether this lock still holds the file."""
        return self._descriptor is not None

    def release(self) -> None:
        """Release the file. Calling it again does nothing."""
        if self._descriptor is None:
            return
        if fcntl is not None:
            # closing is not enough: processes that were forked meanwhile share the open file
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.forget()
        if _held_locks.get(self._path) is self:
            del _held_locks[self._path]

    def forget(self) -> None:
        """Close the file of this process only; another one that shares it keeps the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, path: Path) -> int:
        """Return the descriptor of the file."""
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def _acquire(self) -> None:
        """Take the system's lock."""
        assert self._descriptor is not None
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held_elsewhere(self._owner()) from None
        except OSError:  # a file system without locks
            pass

    def _owner(self) -> str:
        """Return the process that holds the lock, as far as it is known."""
        return "unknown"

    def _held_elsewhere(self, owner: str) -> FimprobeError:
        return FimprobeError(
            f"`{self._option}` must be a file of its own, but {str(self._path)!r} is being written "
            f"by another probe (process {owner}). Call detach() on that one, or pass another file."
        )


class FolderLock(FileLock):
    """Holds a folder by a file in it, which has the number of the process.

    Args:
        folder: The folder to write to; it is made if missing.
        take_over: As in :class:`FileLock`.

    Raises:
        FimprobeError: If another probe holds the folder, or the lock's file is a link.
    """

    def __init__(self, folder: str | Path, *, take_over: bool = False) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        super().__init__(self._folder / FILE_NAME, option="log_dir", take_over=take_over)
        try:
            with contextlib.suppress(OSError):  # a full disk; the lock holds nevertheless
                self._write_owner()
        except BaseException:
            self.release()
            raise

    def _write_owner(self) -> None:
        """Write the number of the process, for messages."""
        assert self._descriptor is not None
        # what is not the number of a process was not written here: it may be a hard link
        contents = self._contents()
        if not contents or contents.isdigit():
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def _open(self, path: Path) -> int:
        """Return the descriptor of the file, which is not a link: its target is not ours to write."""
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise FimprobeError(
                f"`log_dir` must be a folder without links in place of fimprobe's files, but "
                f"{str(path)!r} is a link. Remove it, or pass another folder."
            ) from None

    def _owner(self) -> str:
        return self._contents() or "unknown"

    def _contents(self) -> str:
        """Return the start of the file."""
        assert self._descriptor is not None
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return os.read(self._descriptor, _MAX_PID_BYTES).decode("ascii", "replace").strip()

    def _held_elsewhere(self, owner: str) -> FimprobeError:
        return FimprobeError(
            f"`log_dir` must be a folder of its own, but {str(self._folder.resolve())!r} is being "
            f"written by another probe (process {owner}). Call detach() on that one, or pass another "
            "folder."
        )


def _forget_locks_of_the_parent() -> None:
    """Close in a forked process what its parent holds: the lock must end with the parent."""
    for lock in _held_locks.values():
        with contextlib.suppress(OSError):
            lock.forget()
    _held_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks_of_the_parent)
