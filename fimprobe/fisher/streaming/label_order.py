"""Whether the labels of data that are read in their order come in random order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from fimprobe.fisher.streaming.stopping import MIN_INPUTS

ORDER_ERRORS = 5
"""Standard errors by which equal neighbours may exceed the number that a random order has."""


@dataclass(kw_only=True)
class LabelOrder:
    """Counts of the labels of one process's data, and of neighbours with equal labels.

    Attributes:
        counts: Number of inputs of each label.
        repeats: Number of inputs whose label is that of the input before.
        last: The label of the last input; None before the first one.
    """

    counts: dict[int, int] = field(default_factory=dict)
    repeats: int = 0
    last: int | None = None

    def add(self, labels: Tensor | None) -> None:
        """Add the labels of a batch [B]; None where they are not known."""
        for label in [] if labels is None else labels.tolist():
            self.counts[label] = self.counts.get(label, 0) + 1
            self.repeats += label == self.last
            self.last = label

    def is_sorted(self) -> bool:
        """Return whether the order is known not to be random, or all labels are equal so far.

        Of n labels in random order, Σ c (c − 1)/n have an equal neighbour on average, c being the
        counts. All labels are equal at the beginning of sorted data.

        >>> from torch import arange
        >>> sorted_labels, mixed = LabelOrder(), LabelOrder()
        >>> sorted_labels.add(arange(100) // 10), mixed.add(arange(100) % 10)
        (None, None)
        >>> sorted_labels.is_sorted(), mixed.is_sorted()
        (True, False)
        """
        n = sum(self.counts.values())
        if n < MIN_INPUTS:
            return False
        expected = sum(c * (c - 1) for c in self.counts.values()) / n
        return len(self.counts) == 1 or self.repeats > expected + ORDER_ERRORS * math.sqrt(expected)
