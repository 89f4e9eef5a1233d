"""The samples that one process measures at one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import BatchError
from fimprobe.model.batch import Batch
from fimprobe.training.batch_reader import BatchReader
from fimprobe.training.capture.backward_reach import Reach
from fimprobe.training.capture.captured_batch import CapturedBatch


@dataclass(frozen=True, kw_only=True)
class ProbeBatch:
    """The samples that one process measures at one step.

    Attributes:
        batch: The model's inputs.
        mask: Boolean, of the labels' shape; False where there is no label. None for all.
        labels: Labels of the data [B, ...], for the empirical Fisher only.
        estimators: Those that can be measured with what is known of the batch.
        labels_error: Why the empirical Fisher was requested and is left out; None otherwise.
    """

    batch: Batch
    mask: Tensor | None
    labels: Tensor | None
    estimators: list[str]
    labels_error: BatchError | None = None


def select_samples(
    reader: BatchReader,
    captured: CapturedBatch | None,
    inputs: Any,
    *,
    estimators: Sequence[str],
    max_size: int,
    seed: int,
) -> ProbeBatch:
    """Return the samples to measure: at most ``max_size``, drawn at random from a larger batch.

    Args:
        reader: Knows masks and labels.
        captured: The training batch.
        inputs: Inputs to measure in its place; None for none. Without a loss they have no labels.
        estimators: The estimators that were requested.
        max_size: Largest number of samples.
        seed: Random seed of the draw.

    Raises:
        BatchError: If there is no batch, if it was changed in place after the forward pass, or if
            no backward pass reached its outputs.
    """
    labels, labels_error = None, None
    with_labels = "empirical" in estimators
    if inputs is not None:
        batch = Batch.of(inputs)
        mask = reader.label_mask(batch.args, batch.kwargs)
        with_labels = False
    else:
        if captured is None:
            raise BatchError("no training batch was captured. Call probe.step(inputs) yourself.")
        if not captured.unchanged():
            raise BatchError(
                "the batch was changed in place after the forward pass. Change a copy, or call "
                "probe.step(inputs) yourself."
            )
        if captured.reach is Reach.UNREACHED:
            raise BatchError(
                "no backward pass reached the outputs of the captured forward, so the gradients "
                "belong to another batch. Attach to the object whose outputs the loss reads, or "
                "call probe.step(inputs) yourself."
            )
        batch = Batch.of_call(captured.args, reader.measured_kwargs(captured.kwargs))
        mask = reader.label_mask(captured.args, captured.kwargs, captured)
        if with_labels:
            try:
                labels = reader.data_labels(captured, batch.size)
            except BatchError as error:  # the other estimators need no labels of the data
                labels_error, with_labels = error, False
    if not with_labels:
        estimators = [e for e in estimators if e != "empirical"] or ["i1"]
    if batch.size > max_size:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(batch.size, generator=generator)[:max_size].sort()[0]
        batch = batch[rows]
        mask = None if mask is None else mask[rows.to(mask.device)]
        labels = None if labels is None else labels[rows.to(labels.device)]
    return ProbeBatch(
        batch=batch,
        mask=mask,
        labels=labels,
        estimators=list(estimators),
        labels_error=labels_error,
    )
