"""Processes that measure one batch together, each of them its share."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fimprobe.distributed.merge import merge, merge_bounds
from fimprobe.distributed.parameter_sums import (
    common_shapes,
    drop_sums,
    local_sums,
    sharded_sums,
    sum_shapes,
)
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.jacobian_bounds.layer_bounds import LayerBound
from fimprobe.statistics import Measured

T = TypeVar("T")
MeasuredShare = tuple[Measured, Mapping[str, LayerBound]]
"""Statistics of some samples, and the bounds of each layer for them."""

MAX_REDUCED_NUMBERS = 2**24
"""Numbers that one all-reduce adds: 64 MiB in float32, so that few messages copy little memory."""

JOIN_TIMEOUT_SECONDS = 60.0
"""Time that processes wait for each other in ``attach``, chosen longer than they start apart."""

MEASUREMENT_TIMEOUT_SECONDS = 300.0
"""Time that processes wait for each other in a measurement, chosen longer than a share takes."""

WEIGHTS_TIMEOUT_SECONDS = 60.0
"""Time for one weight of a sharded model.

It is shorter than that of a measurement, so that a process that waits in vain can still report it.
"""

_HAS_LEFT = (
    "this process left the measurements, after an interrupt or an error in one. Attach again on "
    "every process."
)

_join_numbers = itertools.count()


class ProcessGroup(Protocol):
    """Processes that share a measurement; :func:`join_processes` returns one.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int
    size: int

    def run_everywhere(self, action: Callable[[], T]) -> list[T]:
        """Return the results of all processes' ``action``; an error of one is raised on all."""

    def measure_together(self, action: Callable[[], MeasuredShare]) -> MeasuredShare:
        """Return the measurement of the whole batch; ``action`` measures this process's share."""

    def add_tensors(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def weights_group(self) -> Any:
        """Return a ``torch.distributed`` group for the weights of a sharded model.

        A group of their own keeps their messages apart from those of :meth:`run_everywhere`.
        """

    def leave(self) -> None:
        """Send nothing from now on; processes that wait for this one learn it at once."""


class SingleProcess:
    """The group of a single process."""

    rank, size = 0, 1

    def run_everywhere(self, action: Callable[[], T]) -> list[T]:
        """Return the only result."""
        return [action()]

    def measure_together(self, action: Callable[[], MeasuredShare]) -> MeasuredShare:
        """Return the measurement of the only share."""
        return action()

    def add_tensors(self, tensors: list[Tensor]) -> None:
        """Leave the tensors as they are."""

    def weights_group(self) -> Any:
        """Return None: nothing is sent."""

    def leave(self) -> None:
        """Do nothing: nobody waits."""


class GlooProcessGroup:
    """All processes of ``torch.distributed``'s default group, over gloo and with bounded waits.

    Measurements of the shares are merged (:mod:`fimprobe.distributed.merge`): tensors of the
    parameters' shapes by all-reduce, rows of single samples by all-gather.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout_seconds = timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._weights_group: Any = None

    def run_everywhere(self, action: Callable[[], T]) -> list[T]:
        """Return the results of all processes; if any process failed, all raise.

        Args:
            action: Called on this process. Its result must be picklable.

        Raises:
            BatchError: If every failure concerns this batch only.
            FimprobeError: For other failures, and if a process does not answer in time.
        """
        result: Any = None
        error: Exception | None = None
        failure: tuple[bool, str] | None = None
        try:
            result = action()
        except Exception as caught:
            kind = "" if isinstance(caught, FimprobeError) else f"{type(caught).__name__}: "
            error, failure = caught, (isinstance(caught, BatchError), f"{kind}{caught}")
        answers: list[Any] = [None] * self.size
        if self.group is None and error is not None:
            raise error
        answer = result, failure
        self._bounded(lambda group: dist.all_gather_object(answers, answer, group=group))
        failures = {rank: failed for rank, (_, failed) in enumerate(answers) if failed is not None}
        if not failures:
            return [result for result, _ in answers]
        fatal = [rank for rank, (is_batch_error, _) in failures.items() if not is_batch_error]
        # all processes must agree on the kind of error: a batch error lets them continue
        if error is not None and (not fatal or self.rank in fatal):
            raise error
        worst = fatal[0] if fatal else min(failures)
        raise (FimprobeError if fatal else BatchError)(f"process {worst}: {failures[worst][1]}")

    def measure_together(self, action: Callable[[], MeasuredShare]) -> MeasuredShare:
        """Return the measurement of the whole batch, equal on all processes."""
        local: list[Measured] = []

        def measure_share() -> Any:
            measured, bounds = action()
            local.append(measured)
            return drop_sums(measured), sum_shapes(measured), bounds

        rests, shapes, bounds = zip(*self.run_everywhere(measure_share), strict=True)
        sums = local_sums(local[0], common_shapes(shapes))
        self._bounded(lambda group: _add(list(sums.values()), group))
        return merge(rests, sums | sharded_sums(local[0])), merge_bounds(bounds)

    def add_tensors(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, on the CPU, by its sum over the processes."""
        self._bounded(lambda group: _add(tensors, group))

    def weights_group(self) -> Any:
        """Return the group, made at the first call, which all processes make together."""
        if self.group is None:
            raise FimprobeError(_HAS_LEFT)
        if self._weights_group is None:
            timeout = timedelta(seconds=WEIGHTS_TIMEOUT_SECONDS)
            self._weights_group = dist.new_group(backend="gloo", timeout=timeout)
        return self._weights_group

    def leave(self) -> None:
        """Close the connections of this process. Calling it again does nothing.

        A process that ends its measurements alone does so: messages of a later one would be read as
        answers to an earlier one.
        """
        groups = self.group, self._weights_group
        self.group = self._weights_group = None
        for group in groups:
            with contextlib.suppress(Exception):  # torch.distributed may have ended before
                if group is not None:
                    dist.destroy_process_group(group)

    def _bounded(self, action: Callable[[Any], Any]) -> None:
        """Run ``action(group)``; gloo reports an exceeded timeout as a RuntimeError."""
        group, started = self.group, time.monotonic()
        if group is None:
            raise FimprobeError(_HAS_LEFT)
        try:
            action(group)
        except RuntimeError as error:
            cause = f"the other processes did not answer within {self.timeout_seconds:g} s"
            if time.monotonic() - started < 0.9 * self.timeout_seconds:
                cause = "another process left the measurements, as its probe or its training ended"
            raise FimprobeError(
                f"{cause}. Check whether they still run: {str(error).splitlines()[0]}"
            ) from error


def _add(tensors: list[Tensor], group: Any) -> None:
    """Replace each tensor by its sum over the processes of a group."""
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        bucket: list[Tensor] = []
        for x in (x for x in tensors if x.dtype == dtype):
            if bucket and sum(y.numel() for y in [*bucket, x]) > MAX_REDUCED_NUMBERS:
                _all_reduce(bucket, group)
                bucket = []
            bucket.append(x)
        _all_reduce(bucket, group)


def _all_reduce(bucket: list[Tensor], group: Any) -> None:
    flat = torch.cat([x.reshape(-1) for x in bucket])
    dist.all_reduce(flat, group=group)
    for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
        x.copy_(total.view(x.shape))


def join_processes() -> ProcessGroup:
    """Return the group of this training's processes; all of them must call this.

    It waits up to ``JOIN_TIMEOUT_SECONDS`` for the others to call it, and as long again for the group
    to form. Without ``torch.distributed``, or with one process, it returns a :class:`SingleProcess`
    at once.

    Raises:
        FimprobeError: If not all processes call it in time.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SingleProcess()
    joined: queue.SimpleQueue[ProcessGroup | BaseException] = queue.SimpleQueue()

    def join() -> None:
        try:
            joined.put(_join_all())
        except BaseException as error:
            joined.put(error)

    # torch waits without end for a store whose process is stopped: that must not be this thread
    threading.Thread(target=join, name="fimprobe join", daemon=True).start()
    try:
        group = joined.get(timeout=2 * JOIN_TIMEOUT_SECONDS)
    except queue.Empty:
        raise FimprobeError(
            f"the group of processes was not formed within {2 * JOIN_TIMEOUT_SECONDS:g} s. Check "
            "that the others run, above all the one that hosts the store of torch.distributed."
        ) from None
    if isinstance(group, BaseException):
        raise group
    return group


def _join_all() -> ProcessGroup:
    """Return the group of all processes.

    Raises:
        FimprobeError: If not all processes call it in time.
    """
    store = dist.distributed_c10d._get_default_store()
    prefix = f"fimprobe/{next(_join_numbers)}"
    keys = [f"{prefix}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "here")
    outcome = "complete"
    try:
        store.wait(keys, timedelta(seconds=JOIN_TIMEOUT_SECONDS))
    except RuntimeError:
        outcome = "incomplete"
    # the first process to write the outcome decides for all: otherwise one that waited longer
    # could create the group alone, while the others have stopped waiting
    if store.compare_set(f"{prefix}/outcome", "", outcome) == b"incomplete":
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        who = f"processes {missing} of {len(keys)}" if missing else "some processes"
        raise FimprobeError(
            f"{who} attached no probe within {JOIN_TIMEOUT_SECONDS:g} s of the others. Call attach "
            "on every process at the same place; only the first one writes files."
        )
    return GlooProcessGroup(timeout_seconds=MEASUREMENT_TIMEOUT_SECONDS)
