"""A file that is appended to without a buffer and without a thread."""

from __future__ import annotations

import os
from pathlib import Path

from fimprobe.errors import FimprobeError


class AppendedFile:
    """A file whose bytes the system has when :meth:`append` returns, whatever becomes of the process.

    It has no buffer: what fails is not written again when the file is closed. It has no thread, whose
    errors Python would print with a traceback.

    Args:
        path: The file.
        new: Whether the file must not exist yet.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self._file = path.open("xb" if new else "ab", buffering=0)

    def append(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            FimprobeError: If the file was removed: what is written to it would be lost.
            OSError: If the system refuses, as on a full disk.
        """
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FimprobeError("the file was removed")
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        self._file.close()
