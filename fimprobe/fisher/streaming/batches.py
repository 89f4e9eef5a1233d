"""How data are read: batch after batch, with a number for each input.

Data with random access (a tensor, a ``Dataset``, a ``DataLoader`` over one) are read in an order that
the seed determines, whatever the loader's sampler. Other iterables are read as they come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.fisher.streaming.reading import InputReader

DEFAULT_BATCH_SIZE = 64
"""Inputs per batch where the data have no batches."""


@dataclass(kw_only=True)
class NumberedBatch:
    """A batch as the data yield it, with the numbers of its inputs; None where they come later."""

    raw: Any
    indices: Tensor | None


class IndexedSource:
    """Data with random access.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        batch_size: Inputs per batch.
        collate: From a list of items to a batch; None for slices of a tensor.
        loading: Further options of the ``DataLoader`` that loads.
        seed: Determines the order.
    """

    ordered = False
    """Whether batches are those of the data, not of single inputs in random order."""
    repeatable = True
    """Whether the data can be read again."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate: Any,
        seed: int,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.loading, self.seed = dict(loading or {}), seed
        self.size: int | None = len(dataset)

    def count_inputs(self, reader: InputReader, processes: ProcessGroup) -> None:
        """Leave the number of inputs: it is that of the items."""

    def is_stream(self, processes: int) -> bool:
        """Return False: inputs are read in random order."""
        return False

    def first(self, rank: int, processes: int) -> Any:
        """Return this process's first batch; None if it has none."""
        item = next(self.batches(rank, processes, 0), None)
        return None if item is None else item.raw

    def batches(self, rank: int, processes: int, skip: int) -> Iterator[NumberedBatch]:
        """Yield this process's batches in random order.

        Args:
            rank: Number of this process.
            processes: Number of processes.
            skip: Number of this process's batches to leave out.
        """
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.dataset), generator=generator)
        yield from self.at(order, rank, processes, skip)

    def at(
        self, indices: Tensor, rank: int, processes: int, skip: int = 0
    ) -> Iterator[NumberedBatch]:
        """Yield this process's batches of the inputs with the given numbers, in their order."""
        parts = list(indices.split(self.batch_size))[rank::processes][skip:]
        for part, raw in zip(parts, self._load(parts), strict=True):
            yield NumberedBatch(raw=raw, indices=part)

    def _load(self, parts: Sequence[Tensor]) -> Iterable[Any]:
        if self.collate is None:
            return (self.dataset[part.to(self.dataset.device)] for part in parts)
        return DataLoader(
            self.dataset,
            batch_sampler=[part.tolist() for part in parts],
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),
            **self.loading,
        )


class IterableSource:
    """Data that are read in the order in which they come.

    Args:
        data: Any iterable of batches.
        shuffled: Whether their order is known to be random.
    """

    ordered = True

    def __init__(self, data: Iterable[Any], *, shuffled: bool = False) -> None:
        self.data, self.shuffled = data, shuffled
        self.repeatable = iter(data) is not data
        self.size: int | None = None

    def is_stream(self, processes: int) -> bool:
        """Return whether batches are read in the order of the data, which may not be random."""
        return not self.shuffled

    def first(self, rank: int, processes: int) -> Any:
        """Return the first batch; None if there is none. An iterator yields it again."""
        if self.repeatable:
            return next(iter(self.data), None)
        for first in self.data:
            self.data = itertools.chain([first], self.data)
            return first
        return None

    def count_inputs(self, reader: InputReader, processes: ProcessGroup) -> None:
        """Leave the number of inputs unknown until the end."""

    def batches(self, rank: int, processes: int, skip: int) -> Iterator[NumberedBatch]:
        """Yield the batches; each process has a separate shard."""
        for number, raw in enumerate(self.data):
            if number >= skip:
                yield NumberedBatch(raw=raw, indices=None)


class ListSource(IterableSource):
    """A list of batches; a single process reads them in random order.

    Args:
        data: The batches.
        seed: Determines the order.
    """

    def __init__(self, data: Sequence[Any], seed: int) -> None:
        super().__init__(data)
        self.batch_list, self.seed = data, seed
        self.starts: list[int] = []

    def count_inputs(self, reader: InputReader, processes: ProcessGroup) -> None:
        """Count the inputs of all processes.

        Args:
            reader: From batches to inputs.
            processes: Each has a separate shard.
        """
        sizes: list[int] = []

        def count() -> int:
            contents = [reader.read(raw) for raw in self.batch_list]
            sizes.extend(0 if content is None else content[0].size for content in contents)
            return sum(sizes)

        self.size = sum(processes.run_everywhere(count))
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.sizes = sizes

    def is_stream(self, processes: int) -> bool:
        """Return whether batches are read in the order of the list."""
        return processes > 1

    def batches(self, rank: int, processes: int, skip: int) -> Iterator[NumberedBatch]:
        """Yield the batches; the numbers of their inputs are those in the order of the list."""
        if processes > 1 or not self.starts:
            yield from super().batches(rank, processes, skip)
            return
        generator = torch.Generator().manual_seed(self.seed)
        for number in torch.randperm(len(self.batch_list), generator=generator).tolist()[skip:]:
            indices = torch.arange(self.sizes[number]) + self.starts[number]
            yield NumberedBatch(raw=self.batch_list[number], indices=indices)


Source = IndexedSource | IterableSource


def make_source(data: Any, seed: int) -> Source:
    """Return how the data are read.

    Args:
        data: A tensor of inputs, a ``Dataset``, a ``DataLoader`` or any iterable of batches.
        seed: Determines the order of data with random access.

    Raises:
        FimprobeError: If the data cannot be iterated over.
    """
    if isinstance(data, Tensor):
        return IndexedSource(data, DEFAULT_BATCH_SIZE, collate=None, seed=seed)
    if isinstance(data, DataLoader) and _is_whole(data):
        return IndexedSource(
            data.dataset,
            data.batch_size or 1,
            collate=data.collate_fn,
            loading={option: getattr(data, option) for option in _LOADING},
            seed=seed,
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        loader: DataLoader[Any] = DataLoader(data)
        return IndexedSource(data, DEFAULT_BATCH_SIZE, collate=loader.collate_fn, seed=seed)
    if isinstance(data, tuple) and _is_pair(data):
        raise FimprobeError(
            "`data` must be batches, got a tuple of two tensors, which may be one batch of inputs "
            "and labels. Pass [(x, y)] for one batch, or a list [x, y] for two batches of inputs."
        )
    if isinstance(data, (Mapping, str, bytes)) or not isinstance(data, Iterable):
        raise FimprobeError(
            f"`data` must be an iterable of batches, got {type(data).__name__}. Pass a DataLoader, a "
            "list of batches or a tensor of inputs; one batch is [batch]."
        )
    if isinstance(data, (list, tuple)):
        return ListSource(data, seed)
    return IterableSource(data, shuffled=isinstance(data, DataLoader) and _is_shuffled(data))


_LOADING = ("num_workers", "worker_init_fn", "multiprocessing_context", "timeout")
"""Options of a ``DataLoader`` that loading its items needs."""


def _is_pair(data: tuple[Any, ...]) -> bool:
    """Whether a tuple holds two tensors of the same number of rows."""
    tensors = [x for x in data if isinstance(x, Tensor) and x.dim() > 0]
    return len(data) == len(tensors) == 2 and len(tensors[0]) == len(tensors[1])


def _batches_by_torch(loader: DataLoader[Any]) -> bool:
    """Whether the batches of a loader are the collated items that its samplers name."""
    iterates = type(loader).__iter__ is DataLoader.__iter__
    # accelerate's loaders only move batches to a device
    iterates = iterates or type(loader).__module__.startswith("accelerate.")
    return iterates and type(loader.batch_sampler) is BatchSampler


def _is_shuffled(loader: DataLoader[Any]) -> bool:
    """Whether a loader draws items at random."""
    random = (RandomSampler, WeightedRandomSampler, SubsetRandomSampler)
    return _batches_by_torch(loader) and isinstance(loader.sampler, random)


def _is_whole(loader: DataLoader[Any]) -> bool:
    """Whether a loader yields every item of a data set with random access once."""
    if isinstance(loader.dataset, IterableDataset) or not _batches_by_torch(loader):
        return False
    sampler: Any = loader.sampler
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    return type(sampler) in (SequentialSampler, DistributedSampler)


def empty_data_error() -> BatchError:
    """Return the error about data without inputs."""
    return BatchError(
        "`data` must yield at least one input, got none. Check the loader, and whether a generator "
        "was read before."
    )
