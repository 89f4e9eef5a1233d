"""From the batches of a data set to inputs of the model, with a number for each input.

Data with random access (a tensor, a ``Dataset``, a ``DataLoader`` over one) are read in an order that
the seed determines, whatever the loader's sampler. Other iterables are read as they come.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.fisher.streaming.family import positions_of_labels
from fimprobe.model.batch import Batch
from fimprobe.model.twin import unwrap

DEFAULT_BATCH_SIZE = 64
"""Inputs per batch where the data have no batches."""


@dataclass(kw_only=True)
class NumberedBatch:
    """A batch as the data yield it, with the numbers of its inputs; None where they come later."""

    raw: Any
    indices: Tensor | None


@dataclass(kw_only=True)
class InputReader:
    """Turns batches into inputs of the model and masks of labels.

    Attributes:
        model: The model, for the names of its arguments and its device.
        inputs: From a batch to the model's inputs; None for the rules of :meth:`read`.
        mask: From a batch to a boolean tensor of the labels' shape; None for all labels.
    """

    model: nn.Module
    inputs: Callable[[Any], Any] | None
    mask: Callable[[Any], Tensor | None] | None

    def read(self, raw: Any) -> tuple[Batch, Tensor | None] | None:
        """Return inputs and mask on the model's device; None for an empty batch.

        A tensor is the input, the first of a pair is, and a mapping holds keyword arguments, of which
        those that the forward does not accept are left out.

        Raises:
            FimprobeError: If the batch has another form.
        """
        selected = self.inputs(raw) if self.inputs is not None else self._select(raw)
        leaves = [x for x in tree_leaves(_plain(selected)) if isinstance(x, Tensor) and x.dim() > 0]
        if leaves and leaves[0].shape[0] == 0:
            return None
        parameter = next(unwrap(self.model).parameters())
        moved = _to(_plain(selected), parameter.device)
        mask = None if self.mask is None else self.mask(raw)
        if isinstance(moved, dict):
            moved, positions = positions_of_labels(self.model, moved)
            mask = positions if self.mask is None else mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise FimprobeError(
                "`mask` must return a boolean tensor with an entry for each label, got "
                f"{mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}. Return "
                "attention_mask.bool() or the like."
            )
        return Batch.of(moved), None if mask is None else mask.to(parameter.device)

    def _select(self, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            accepted = _keywords(unwrap(self.model))
            chosen = {k: v for k, v in raw.items() if accepted is None or k in accepted}
            if not chosen:
                raise FimprobeError(
                    f"`data` must yield mappings with arguments of the model, got keys "
                    f"{sorted(map(str, raw))}. Pass `inputs`, a function from a batch to the model's "
                    "inputs."
                )
            return chosen
        if isinstance(raw, (tuple, list)):
            if not 1 <= len(raw) <= 2:
                raise FimprobeError(
                    f"`data` must yield tensors, pairs (inputs, labels) or mappings, got a "
                    f"{type(raw).__name__} of {len(raw)}. Pass `inputs`, a function from a batch to "
                    "the model's inputs, such as lambda batch: batch[:2]."
                )
            return raw[0]
        return raw


def _plain(inputs: Any) -> Any:
    """A mapping of any class as a dictionary, so that its tensors are found."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _to(inputs: Any, device: torch.device) -> Any:
    def moved(x: Any) -> Any:
        return x.detach().to(device) if isinstance(x, Tensor) else x

    return tree_map(moved, inputs)


def _keywords(model: nn.Module) -> set[str] | None:
    """Names of the forward's arguments; None where it accepts any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


class IndexedSource:
    """Data with random access.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        batch_size: Inputs per batch.
        collate: From a list of items to a batch; None for slices of a tensor.
        workers: Number of processes that load.
        seed: Determines the order.
    """

    ordered = False
    """Whether batches come in the order of the data."""
    repeatable = True
    """Whether the data can be read again."""

    def __init__(
        self, dataset: Any, batch_size: int, *, collate: Any, workers: int = 0, seed: int
    ) -> None:
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.workers, self.seed = workers, seed
        self.size: int | None = len(dataset)

    def count_inputs(self, reader: InputReader, processes: ProcessGroup) -> None:
        """Leave the number of inputs: it is that of the items."""

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
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.seed),
        )


class IterableSource:
    """Data that are read in the order in which they come.

    Args:
        data: Any iterable of batches.
    """

    ordered = True

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.repeatable = iter(data) is not data
        self.size: int | None = None

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
            workers=data.num_workers,
            seed=seed,
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        loader: DataLoader[Any] = DataLoader(data)
        return IndexedSource(data, DEFAULT_BATCH_SIZE, collate=loader.collate_fn, seed=seed)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise FimprobeError(
            f"`data` must be an iterable of batches, got {type(data).__name__}. Pass a DataLoader, a "
            "list of batches or a tensor of inputs; one batch is [batch]."
        )
    return ListSource(data, seed) if isinstance(data, (list, tuple)) else IterableSource(data)


def _is_whole(loader: DataLoader[Any]) -> bool:
    """Whether a loader yields every item of a data set with random access once."""
    if isinstance(loader.dataset, IterableDataset) or type(loader.batch_sampler) is not BatchSampler:
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
