"""Sums over the parameters of every group, all groups at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Mapping[str, Sequence[str]]
"""The parameters of each group, by the group's name."""

AT_ONCE = 2**23
"""Numbers of Gram matrices, and of products of theirs, that are held together."""


def split_groups(groups: Groups, each: int) -> Iterator[dict[str, Sequence[str]]]:
    """The groups in parts, for ``each`` numbers a group.

    >>> [list(part) for part in slabs({"a": ["w"], "b": ["v"], "c": ["w", "v"]}, AT_ONCE // 2)]
    [['a', 'b'], ['c']]
    """
    step = max(1, AT_ONCE // max(1, each))
    names = list(groups)
    for start in range(0, len(names), step):
        yield {name: groups[name] for name in names[start : start + step]}


class GroupSums:
    """Which parameters are in which groups; sums of their records' fields, [G, ...] in float64.

    >>> from types import SimpleNamespace as Record
    >>> known = {"w": Record(norms=torch.tensor([1.0])), "v": Record(norms=torch.tensor([2.0]))}
    >>> Members({"a": ["w"], "both": ["w", "v"]}).sum(known, "norms").tolist()
    [[1.0], [3.0]]
    """

    def __init__(self, groups: Groups) -> None:
        names = [name for group in groups.values() for name in group]
        index = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.names, self.count = list(index), len(groups)
        self.rows = torch.tensor([row for row, g in enumerate(groups.values()) for _ in g])
        self.places = torch.tensor([index[name] for name in names])

    def sum_numbers(self, parameters: Mapping[str, Any], *fields: str) -> Tensor:
        """Of fields that are numbers: [fields, G]."""
        told = [[getattr(parameters[name], of) for name in self.names] for of in fields]
        return self._total(torch.tensor(told, dtype=torch.float64).T).T

    def sum(self, parameters: Mapping[str, Any], field: str) -> Tensor:
        """Of a field that is a tensor."""
        found = self.sum_known(parameters, field)
        assert found is not None
        return found

    def sum_known(self, parameters: Mapping[str, Any], field: str) -> Tensor | None:
        """The same, None where a parameter has none."""
        values = [getattr(parameters[name], field) for name in self.names]
        if any(value is None for value in values):
            return None
        return self._total(torch.stack(values).double().cpu())

    def _total(self, values: Tensor) -> Tensor:
        # no product with zeros: what is infinite in one group stays out of the others
        total = values.new_zeros(self.count, *values.shape[1:])
        return total.index_add_(0, self.rows, values[self.places])
