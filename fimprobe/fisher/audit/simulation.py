"""Simulated squares of random batches, from the gradients of single inputs at some entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimprobe.fisher.audit.candidates import CandidateMeasurer
from fimprobe.fisher.audit.labellings import MODEL, Labelling, drawn_labels

MAX_ROWS, MAX_ENTRIES = 2048, 512
"""Inputs and entries whose gradients are stored; more inputs are simulated by drawing from them."""

STORED_DRAWS = 3
"""Labels from the model that are stored for each input; a simulation chooses one of them."""


@dataclass(kw_only=True)
class StoredGradients:
    """Gradients of single inputs for every labelling.

    Attributes:
        rows: By labelling [draws, inputs, entries]; one draw where labels are not random.
        entries: Their places in the vector of all compared entries.
        inputs: Number of inputs of the data; that of ``rows`` or more.
        generator: For partitions and choices of labels.
    """

    rows: Mapping[str, Tensor]
    entries: Tensor
    inputs: int
    generator: torch.Generator

    def simulate(self, key: str, size: int, count: int) -> tuple[Tensor, Tensor]:
        """Return sums over random batches of squared gradients.

        Args:
            key: The labelling.
            size: Inputs per batch; the last one may have fewer.
            count: Number of simulations.

        Returns:
            Σ m² and Σ b² m² of batch means m, float64 [count, entries].
        """
        plain, weighted = [], []
        for _ in range(count):
            rows = self._sample(key)
            whole = len(rows) // size * size
            sums = rows[:whole].view(-1, size, rows.shape[1]).sum(1).square()
            first, second = sums.sum(0) / size**2, sums.sum(0)
            if whole < len(rows):
                last = rows[whole:].sum(0).square()
                first, second = first + last / (len(rows) - whole) ** 2, second + last
            plain.append(first)
            weighted.append(second)
        return torch.stack(plain), torch.stack(weighted)

    def _sample(self, key: str) -> Tensor:
        """Gradients of all inputs in a random order [N, entries]."""
        rows = self.rows[key]
        stored = rows.shape[1]
        if stored == self.inputs:
            order = torch.randperm(stored, generator=self.generator)
        else:
            order = torch.randint(stored, (self.inputs,), generator=self.generator)
        draws = torch.randint(len(rows), (self.inputs,), generator=self.generator)
        return rows[draws, order]


def store_gradients(
    measurer: CandidateMeasurer, labellings: list[Labelling], fisher: Tensor, seed: int
) -> StoredGradients:
    """Return the gradients of single inputs, from one pass over the data.

    Args:
        measurer: Measures gradients.
        labellings: Those whose labels are not random; labels drawn from the model are added.
        fisher: F as a vector: half of the entries are its largest.
        seed: For labels and simulations.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = _choose_entries(fisher, generator)
    drawn = drawn_labels(measurer.measurer.likelihood, generator)
    draws = [replace(drawn, key=f"{MODEL} {i}") for i in range(STORED_DRAWS)]
    every = [*labellings, *draws]
    rows: dict[str, list[Tensor]] = {one.key: [] for one in every}
    count = 0
    for batch, mask, labels in measurer.data.batches():
        for i in range(min(batch.size, max(0, MAX_ROWS - count))):
            one = slice(i, i + 1)
            single = (
                batch[one],
                None if mask is None else mask[one],
                None if labels is None else labels[one],
            )
            for key, gradient in measurer.gradients(single, every).items():
                rows[key].append(gradient[entries])
        count += batch.size
    stacked = {key: torch.stack(x) for key, x in rows.items()}
    by_key = {one.key: stacked[one.key].unsqueeze(0) for one in labellings}
    by_key[MODEL] = torch.stack([stacked[one.key] for one in draws])
    return StoredGradients(rows=by_key, entries=entries, inputs=count, generator=generator)


def _choose_entries(fisher: Tensor, generator: torch.Generator) -> Tensor:
    """The largest entries, and some of the others."""
    if len(fisher) <= MAX_ENTRIES:
        return torch.arange(len(fisher))
    order = fisher.argsort(descending=True)
    largest, others = order.split([MAX_ENTRIES // 2, len(fisher) - MAX_ENTRIES // 2])
    chosen = torch.randperm(len(others), generator=generator)[: MAX_ENTRIES // 2]
    return torch.cat([largest, others[chosen]])
