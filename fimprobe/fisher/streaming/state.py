"""The file from which an interrupted estimate continues."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimprobe._version import __version__
from fimprobe.errors import FimprobeError

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
    return f"fimprobe {__version__}, model {checksum:08x}, {described}"


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
        if self.several and self.path.exists():
            os.replace(self.path, self._previous)
        os.replace(temporary, self.path)
        self._written = time.monotonic()
        self._seconds = self._written - started
