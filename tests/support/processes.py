"""Processes that measure together, forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["torch.distributed.fsdp", "fimprobe"]
"""Their import takes some 8 s of CPU time: the server pays it once, for every process of a test run."""


def start_processes(function: Callable[..., None], args: tuple[Any, ...], size: int) -> Any:
    """``function(rank, *args)`` in ``size`` processes, whose torch context is returned.

    The server has no threads when it forks, other than this process, and holds no state of tests.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    return mp.start_processes(function, args, size, join=False, start_method="forkserver")


def free_port() -> int:
    """A port of this machine that no program listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables by which torchrun gives a process its place."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {
        name: str(value) for name, value in place.items()
    }
