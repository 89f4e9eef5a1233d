"""One writer a folder: a lock that ends with its process, so a crash leaves nothing in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fimprobe.types import FimprobeError

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not noticed there
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "fimprobe.lock"


def lock_folder(folder: str | Path) -> Callable[[], None]:
    """Hold ``folder`` until the returned function is called or the process ends.

    The file stays; what counts is the system's lock on it, which no dead process holds.

    Raises:
        FimprobeError: where another probe, of this process or another, holds it.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    file = (path / FILE_NAME).open("a+")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise FimprobeError(
                f"log_dir={str(folder)!r} is being written by another probe (process {owner}); "
                "two writers would mix their charts: detach() that one, or pass another log_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file.close
