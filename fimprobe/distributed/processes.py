"""Processes that measure one batch together, each its share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fimprobe.distributed.merge import (
    common_shapes,
    drop_sums,
    local_sums,
    merge,
    merge_bounds,
    shapes_of,
    sharded_sums,
)
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.jacobian_bounds.layer_bounds import LayerBound
from fimprobe.statistics import Measured

T = TypeVar("T")
Found = tuple[Measured, Mapping[str, LayerBound]]
BUCKET = 2**24
"""Numbers that are added in one message."""
JOIN_TIMEOUT_SECONDS = 60.0
"""Seconds that processes wait for each other in ``attach``."""
TIMEOUT = 300.0
"""Seconds that they wait for each other in a measurement."""
WEIGHTS_TIMEOUT = 60.0
"""Seconds for one weight of a sharded model; shorter, so that who waits in vain can still tell."""
_joined = itertools.count()


class ProcessGroup(Protocol):
    """What a measurement needs of the processes it is shared by."""

    rank: int
    size: int

    def together(self, act: Callable[[], T]) -> list[T]:
        """Every process's result of its ``act``; the error of one is raised on all of them."""

    def combine(self, act: Callable[[], Found]) -> Found:
        """The measurement of the whole batch from that of each process's share."""

    def for_weights(self) -> Any:
        """A process group for a sharded model's weights, so that no message meets another kind."""


class SingleProcess:
    """A single process."""

    rank, size = 0, 1

    def together(self, act: Callable[[], T]) -> list[T]:
        """The one result."""
        return [act()]

    def combine(self, act: Callable[[], Found]) -> Found:
        """What was measured."""
        return act()

    def for_weights(self) -> Any:
        """There is none."""


class GlooProcessGroup:
    """All processes of ``torch.distributed``'s default group, over gloo and with bounded waits.

    Measurements of their shares are added (:mod:`fimprobe.distributed.merge`): tensors of the
    parameters' shapes by all-reduce, rows of single samples by all-gather.
    """

    def __init__(self, *, timeout: float) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._for_weights: Any = None

    def together(self, act: Callable[[], T]) -> list[T]:
        """Every process's result; where any failed, all raise.

        Raises:
            BatchError: where all that failed did so for their batch only.
            FimprobeError: else; also where a process does not answer in time.
        """
        result: Any = None
        failure: Exception | None = None
        told: tuple[bool, str] | None = None
        try:
            result = act()
        except Exception as error:
            kind = "" if isinstance(error, FimprobeError) else f"{type(error).__name__}: "
            failure, told = error, (isinstance(error, BatchError), f"{kind}{error}")
        answers: list[Any] = [None] * self.size
        self._bounded(lambda: dist.all_gather_object(answers, (result, told), group=self.group))
        failed = {rank: told for rank, (_, told) in enumerate(answers) if told is not None}
        if not failed:
            return [result for result, _ in answers]
        fatal = [rank for rank, (batch_only, _) in failed.items() if not batch_only]
        if failure is not None and (not fatal or self.rank in fatal):
            raise failure
        worst = fatal[0] if fatal else min(failed)
        raise (FimprobeError if fatal else BatchError)(f"process {worst}: {failed[worst][1]}")

    def combine(self, act: Callable[[], Found]) -> Found:
        """The measurement of the whole batch, the same on all processes."""
        own: list[Measured] = []

        def share() -> Any:
            measured, bounds = act()
            own.append(measured)
            return drop_sums(measured), shapes_of(measured), bounds

        rests, shapes, bounds = zip(*self.together(share), strict=True)
        sums = local_sums(own[0], common_shapes(shapes))
        self._bounded(lambda: self._add(list(sums.values())))
        return merge(rests, sums | sharded_sums(own[0])), merge_bounds(bounds)

    def for_weights(self) -> Any:
        """Made where it is first asked for, by all processes."""
        if self._for_weights is None:
            wait = timedelta(seconds=WEIGHTS_TIMEOUT)
            self._for_weights = dist.new_group(backend="gloo", timeout=wait)
        return self._for_weights

    def _add(self, tensors: list[Tensor]) -> None:
        """Replace each by its sum over the processes."""
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            bucket: list[Tensor] = []
            for x in [*(x for x in tensors if x.dtype == dtype), None]:
                if bucket and (x is None or sum(y.numel() for y in bucket) + x.numel() > BUCKET):
                    flat = torch.cat([y.reshape(-1) for y in bucket])
                    dist.all_reduce(flat, group=self.group)
                    for y, part in zip(bucket, flat.split([y.numel() for y in bucket]), strict=True):
                        y.copy_(part.view(y.shape))
                    bucket = []
                if x is not None:
                    bucket.append(x)

    def _bounded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise FimprobeError(
                f"the other processes did not answer (waited at most {self.timeout:g} s): "
                f"{str(error).splitlines()[0]}"
            ) from error


def join() -> ProcessGroup:
    """The processes of this training that probe as well; :class:`SingleProcess` for a single process.

    Waits up to ``JOIN_TIMEOUT_SECONDS`` seconds for all of them to come here.

    Raises:
        FimprobeError: where some do not.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SingleProcess()
    store = dist.distributed_c10d._get_default_store()
    meeting = f"fimprobe/{next(_joined)}"
    keys = [f"{meeting}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "here")
    end = "met"
    try:
        store.wait(keys, timedelta(seconds=JOIN_TIMEOUT_SECONDS))
    except RuntimeError:
        end = "left"
    # the first to say how it ended says it for all: nobody is left alone in making the group
    if store.compare_set(f"{meeting}/end", "", end) == b"left":
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        who = f"processes {missing} of {len(keys)}" if missing else "some processes"
        raise FimprobeError(
            f"{who} attached no probe within {JOIN_TIMEOUT_SECONDS:g} s of the others; "
            "attach on every process at the same place (only the first one writes)"
        )
    return GlooProcessGroup(timeout=TIMEOUT)
