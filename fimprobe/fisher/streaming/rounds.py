"""Reading one batch on every process, with the numbers of its inputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import FimprobeError, describe_error
from fimprobe.fisher.streaming.batches import NumberedBatch
from fimprobe.fisher.streaming.label_order import LabelOrder
from fimprobe.fisher.streaming.reading import InputReader, class_labels
from fimprobe.fisher.streaming.stopping import next_decision
from fimprobe.model.batch import Batch

Content = tuple[Batch, Tensor | None, Tensor]
"""The inputs of a batch, their mask and their numbers."""


@dataclass(kw_only=True)
class Limits:
    """When an estimate ends before its error is reached.

    Attributes:
        inputs: Largest number of inputs; None for no limit.
        seconds: Longest time; None for no limit.
    """

    inputs: int | None
    seconds: float | None


@dataclass(kw_only=True)
class Position:
    """How far a process has read.

    Attributes:
        phase: "uniform", "trace" (of the forward passes that measure τ) or "draws".
        batches: Batches of this process, empty ones included.
        next_index: Number of the next input of data without numbers, over all processes.
        inputs: Inputs of all processes.
        measured_batches: Batches of all processes, without empty ones.
        decision: Number of batches at which is decided next.
        rounds: Rounds of all phases, by which processes agree on a state.
        passes: Backward passes per input, 0 before they are known. They are exact labels, or drawn.
        exact: Whether labels are exact.
    """

    phase: str = "uniform"
    batches: int = 0
    next_index: int = 0
    inputs: int = 0
    measured_batches: int = 0
    decision: int = field(default_factory=lambda: next_decision(0))
    rounds: int = 0
    passes: int = 0
    exact: bool = False

    @property
    def labels(self) -> int | None:
        """Labels per input; None for exact ones."""
        return None if self.exact else self.passes


@dataclass(frozen=True, kw_only=True)
class Round:
    """One batch of every process.

    Attributes:
        content: This process's batch; None if it has none.
        sizes: Number of inputs of every process; None at the end of its data.
        late: Whether the time is over.
    """

    content: Content | None
    sizes: list[int | None]
    late: bool

    @property
    def ended(self) -> bool:
        """Whether no process has data left."""
        return all(size is None for size in self.sizes)

    @property
    def inputs(self) -> int:
        """Number of inputs of all processes."""
        return sum(size or 0 for size in self.sizes)


@dataclass(kw_only=True)
class RoundReader:
    """Reads rounds.

    Attributes:
        reader: From batches to inputs.
        processes: The processes that read together.
        limits: Where reading ends.
        order: The labels of this process's data in the order in which they come.
    """

    reader: InputReader
    processes: ProcessGroup
    limits: Limits
    order: LabelOrder = field(default_factory=LabelOrder)

    def next(
        self, batches: Iterator[NumberedBatch], position: Position, started: float | None
    ) -> Round:
        """Read one batch on every process.

        Args:
            batches: This process's batches.
            position: How far it has read.
            started: The time at which the estimate began; None for reading without limits.

        Raises:
            FimprobeError: If the data cannot be read.
        """
        contents: list[tuple[Batch, Tensor | None, Tensor | None]] = []

        def read_one() -> tuple[int | None, bool]:
            item = _next_item(batches, position.batches)
            if item is None:
                return None, False
            read = self.reader.read(item.raw)
            self.order.add(class_labels(item.raw))
            late = self._is_late(started)
            if read is None:
                return 0, late
            size = read[0].size
            if item.indices is not None and len(item.indices) != size:
                raise FimprobeError(
                    f"`data` must yield one input for each item, but batch {position.batches} has "
                    f"{size} inputs for {len(item.indices)} items. Pass `inputs`, or a list of "
                    "batches."
                )
            contents.append((*read, item.indices))
            return size, late

        answers = self.processes.run_everywhere(read_one)
        sizes = [size for size, _ in answers]
        before = sum(size or 0 for size in sizes[: self.processes.rank])
        left = None
        if self.limits.inputs is not None and started is not None:
            left = self.limits.inputs - position.inputs
        content = None
        if contents:
            batch, mask, indices = contents[0]
            if indices is None:
                indices = torch.arange(batch.size) + position.next_index + before
            content = (batch, mask, indices)
            if left is not None:
                content = _cut(content, left - before)
        return Round(
            content=content,
            sizes=sizes if left is None else _limited(sizes, left),
            late=any(late for _, late in answers),
        )

    def _is_late(self, started: float | None) -> bool:
        if started is None or self.limits.seconds is None:
            return False
        return time.monotonic() - started > self.limits.seconds


def _next_item(batches: Iterator[NumberedBatch], number: int) -> NumberedBatch | None:
    try:
        return next(batches, None)
    except FimprobeError:
        raise
    except Exception as error:
        raise unreadable(number, error) from error


def unreadable(number: int, error: Exception) -> FimprobeError:
    """Return the error about data that cannot be read.

    Args:
        number: Number of the batch.
        error: The error of the data.
    """
    return FimprobeError(
        f"`data` must be readable, but batch {number} is not ({_one_line(error)}). What was measured "
        "before it is kept."
    )


def _one_line(error: Exception) -> str:
    """The message of an error; that of a loader's worker ends with the original one."""
    lines = describe_error(error).strip().splitlines()
    return lines[-1] if "in DataLoader worker process" in lines[0] else lines[0]


def _cut(content: Content, allowed: int) -> Content | None:
    """The first ``allowed`` inputs of a batch."""
    batch, mask, indices = content
    if allowed <= 0:
        return None
    if allowed >= batch.size:
        return content
    return batch[slice(allowed)], None if mask is None else mask[:allowed], indices[:allowed]


def _limited(sizes: list[int | None], left: int) -> list[int | None]:
    """The numbers of inputs of every process that are measured."""
    limited: list[int | None] = []
    for size in sizes:
        limited.append(None if size is None else max(0, min(size, left)))
        left -= size or 0
    return limited


FAILED_MODEL = "the model raises"
"""The beginning of the message of a twin that cannot be compared because the model fails."""


def with_batch(number: int, batch: Batch, error: Exception) -> Exception:
    """Return the error to raise for a batch: one of the model's forward names the batch.

    Args:
        number: Number of the batch.
        batch: Its inputs.
        error: The error.
    """
    own = isinstance(error, FimprobeError) and not str(error).startswith(FAILED_MODEL)
    if own or isinstance(error, torch.OutOfMemoryError):
        return error
    return FimprobeError(_failed_forward(number, batch, error))


def _failed_forward(number: int, batch: Batch, error: Exception) -> str:
    """The message about inputs on which the model fails."""
    shapes = ", ".join(
        f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        for x in (*batch.args, *batch.kwargs.values())
        if isinstance(x, Tensor)
    )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"`data` must yield inputs of the model, but the model fails on batch {number} with inputs "
        f"{shapes} ({first_line}). Pass `inputs`, a function from a batch to the model's inputs."
    )
