"""The data of an audit: batches with the labels of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.batches import (
    IndexedSource,
    ListSource,
    Source,
    empty_data_error,
)
from fimprobe.fisher.streaming.reading import InputReader
from fimprobe.model.batch import Batch
from fimprobe.training.likelihood_inference.transformers_heads import data_labels

Labelled = tuple[Batch, Tensor | None, Tensor | None]
"""Inputs, mask and labels of the data of a batch."""


@dataclass(kw_only=True)
class LabelledData:
    """Batches of inputs and labels, which can be read several times.

    Attributes:
        model: The model.
        data: What was given.
        source: How it is read.
        reader: From batches to inputs.
        labels: From a batch to its labels; None for the rules of :meth:`labels_of`.
        max_inputs: Largest number of inputs that are read; None for all.
    """

    model: nn.Module
    data: Any
    source: Source
    reader: InputReader
    labels: Callable[[Any], Any] | None
    max_inputs: int | None
    inputs_read: int = 0
    """Number of inputs of the last pass of :meth:`batches`."""

    def __post_init__(self) -> None:
        """Check that the data can be read again.

        Raises:
            FimprobeError: If they cannot, or are the share of one of several processes.
        """
        sampler = getattr(self.data, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise FimprobeError(
                "`data` must be the whole data for an audit, got a DataLoader whose sampler leaves "
                f"each of {sampler.num_replicas} processes a share. Pass one without it."
            )
        if not self.source.repeatable:
            raise FimprobeError(
                f"`data` must be readable more than once for an audit, got a "
                f"{type(self.data).__name__}. Pass a DataLoader or a list of batches."
            )

    @property
    def batch_size(self) -> int | None:
        """Inputs of a batch as given; None if it is not known."""
        if isinstance(self.source, IndexedSource):
            return self.source.batch_size if isinstance(self.data, DataLoader) else None
        first = next(iter(self.data), None)
        content = None if first is None else self.reader.read(first)
        return None if content is None else content[0].size

    @property
    def is_ordered(self) -> bool:
        """Whether the batches as given are the same each time."""
        if isinstance(self.data, DataLoader):
            return not isinstance(self.data.sampler, RandomSampler)
        return isinstance(self.source, ListSource)

    def labels_of(self, raw: Any) -> Tensor | None:
        """Return the labels of a batch: the second of a pair, or ``labels`` of a mapping."""
        if self.labels is not None:
            labels = self.labels(raw)
        elif isinstance(raw, Mapping):
            labels = data_labels(self.model, (), dict(raw))
        elif isinstance(raw, (tuple, list)) and len(raw) == 2:
            labels = raw[1]
        else:
            labels = None
        return labels if isinstance(labels, Tensor) and labels.dim() > 0 else None

    def _read(self, raw: Any) -> Labelled | None:
        content = self.reader.read(raw)
        return None if content is None else (*content, self.labels_of(raw))

    def batches(self) -> Iterator[Labelled]:
        """Yield all batches, at most ``max_inputs`` inputs.

        Raises:
            FimprobeError: If there is no input.
        """
        self.inputs_read = 0
        items = (item.raw for item in self.source.batches(0, 1, 0))
        for content in _limited(self._all_read(items), self.max_inputs):
            self.inputs_read += content[0].size
            yield content

    def given_batches(self) -> Iterator[Labelled]:
        """Yield the batches as the data yield them."""
        yield from self._all_read(self.data)

    def _all_read(self, items: Iterable[Any]) -> Iterator[Labelled]:
        empty = True
        for raw in items:
            content = self._read(raw)
            if content is not None:
                empty = False
                yield content
        if empty:
            raise empty_data_error()


def _limited(batches: Iterable[Labelled], left: int | None) -> Iterator[Labelled]:
    """The first inputs of some batches."""
    for content in batches:
        if left is not None and content[0].size >= left:
            yield _rows_of(content, torch.arange(left))
            return
        yield content
        left = None if left is None else left - content[0].size


def _rows_of(content: Labelled, rows: Tensor) -> Labelled:
    batch, *others = content
    mask, labels = (None if x is None else x[rows.to(x.device)] for x in others)
    return batch[rows], mask, labels
