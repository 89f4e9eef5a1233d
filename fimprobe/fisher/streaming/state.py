"""The file from which an interrupted estimate continues."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe._version import __version__
from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.batches import Source
from fimprobe.fisher.streaming.reading import InputReader
from fimprobe.fisher.streaming.rounds import unreadable

FORMAT = 2
"""Version of the file's layout."""

WRITING_SHARE = 0.05
"""Largest share of the time that is spent on writing."""


def fingerprint(parameters: Mapping[str, Tensor], options: Mapping[str, Any]) -> str:
    """Return a text that differs for another model, other data or other options.

    Args:
        parameters: The model's parameters: names, shapes and values count.
        options: Plain values.
    """
    checksum = 0
    for name, p in parameters.items():
        norm = float(p.double().norm())
        checksum = zlib.crc32(f"{name}{tuple(p.shape)}{norm!r}".encode(), checksum)
    described = ", ".join(f"{k}={v!r}" for k, v in options.items())
    return f"fimprobe {__version__}, layout {FORMAT}, model {checksum:08x}, {described}"


def content_checksum(source: Source, reader: InputReader, rank: int, processes: int) -> int:
    """Return a number that differs for other data: the checksum of a process's first batch.

    Args:
        source: The data.
        reader: From batches to inputs.
        rank: Number of the process.
        processes: Number of processes.

    Raises:
        FimprobeError: If the data cannot be read.
    """
    try:
        raw = source.first(rank, processes)
    except Exception as error:
        raise unreadable(0, error) from error
    content = None if raw is None else reader.read(raw)
    checksum = 0
    for x in tree_leaves(content and (content[0].args, content[0].kwargs, content[1])):
        if isinstance(x, Tensor):
            plain = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            shape = f"{tuple(x.shape)}{x.dtype}".encode()
            checksum = zlib.crc32(plain.numpy().tobytes(), zlib.crc32(shape, checksum))
    return checksum


def check_content(stored: int, now: int, again: Callable[[], int] | None, ordered: bool) -> None:
    """Refuse to continue with data whose first batch differs.

    Args:
        stored: The checksum in the state.
        now: That of the data.
        again: Reads the data anew; None where they can be read once only.
        ordered: Whether batches are those of the data.

    Raises:
        FimprobeError: Unless single inputs are read, which are augmented at random.
    """
    if stored == now:
        return
    varies = again is not None and again() != now
    if varies and ordered:
        raise FimprobeError(
            "`data` must yield the same batches in the same order each time for `state`, but the "
            "first batch differs. Pass a Dataset, a DataLoader over one, or a list of batches."
        )
    if not varies:
        raise FimprobeError(
            "`state` must belong to this estimate, but it holds one of other data: the first batch "
            "differs. Pass another path, or delete it to start again."
        )


class StateFile:
    """The state of one process, replaced as a whole.

    Args:
        path: The file; None for none.
        rank: Number of the process; each has its file.
        processes: Number of processes.
        identity: :func:`fingerprint` of the estimate.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, *, rank: int, processes: int, identity: str
    ) -> None:
        suffix = f".{rank}" if processes > 1 else ""
        self.path = None if path is None else Path(f"{os.fspath(path)}{suffix}")
        if self.path is not None and not self.path.absolute().parent.is_dir():
            raise FimprobeError(
                f"`state` must be a file in an existing folder, got {os.fspath(path)!r}. "  # type: ignore[arg-type]
                f"Create {str(self.path.absolute().parent)!r} first."
            )
        self.several, self.identity = processes > 1, f"{identity}, processes={processes}"
        self._seconds, self._written = 0.0, time.monotonic()

    def candidates(self) -> list[dict[str, Any]]:
        """Return the stored states, the newest first; several processes keep the one before too.

        Raises:
            FimprobeError: If the file belongs to another estimate, or is damaged.
        """
        if self.path is None:
            return []
        return [self._read(p) for p in (self.path, self._previous) if p.exists()]

    def newest(self, processes: ProcessGroup) -> dict[str, Any] | None:
        """Return the newest state that every process has; None if there is none.

        Raises:
            FimprobeError: If the files do not fit each other or this estimate.
        """
        stored = self.candidates()
        rounds = [state["position"]["rounds"] for state in stored]
        everywhere = processes.run_everywhere(lambda: rounds)
        common = set(everywhere[0]).intersection(*everywhere[1:])
        if common:
            return stored[rounds.index(max(common))]
        if any(everywhere):
            raise FimprobeError(
                "`state` must hold the same moment for every process, but the files differ. Delete "
                "them to start again."
            )
        return None

    @property
    def _previous(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ".previous")

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            identity = state["identity"]
        except Exception as error:
            raise FimprobeError(
                f"`state` must be a file that an estimate wrote, but {path} cannot be read "
                f"({type(error).__name__}). Pass another path, or delete it to start again."
            ) from None
        if identity != self.identity:
            raise FimprobeError(
                f"`state` must belong to this estimate, but {path} holds another one ({identity}; "
                f"now {self.identity}). Pass another path, or delete it to start again."
            )
        return state

    def is_due(self) -> bool:
        """Return whether enough time has passed since the last writing."""
        passed = time.monotonic() - self._written
        return self.path is not None and passed * WRITING_SHARE >= self._seconds

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file; a process that is killed leaves the old one or the new one."""
        if self.path is None:
            return
        started = time.monotonic()
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            torch.save({**state, "identity": self.identity}, file)
            file.flush()
            os.fsync(file.fileno())
        if self.path.exists():
            with contextlib.suppress(OSError):  # some file systems have no modes
                shutil.copymode(self.path, temporary)
        if self.several and self.path.exists():
            os.replace(self.path, self._previous)
        os.replace(temporary, self.path)
        self._written = time.monotonic()
        self._seconds = self._written - started
