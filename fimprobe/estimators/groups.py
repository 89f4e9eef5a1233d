"""Sums over the parameters of every group, for all groups in one operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Mapping[str, Sequence[str]]
"""The parameters of each group, by the group's name."""

MAX_ELEMENTS = 2**23
"""Elements of the Gram matrices, and of their products, that are in memory together (64 MiB)."""


def split_groups(groups: Groups, elements: int) -> Iterator[GroupSums]:
    """Yield the groups in parts of at most ``MAX_ELEMENTS``.

    Args:
        groups: The parameters of each group.
        elements: Elements in memory for one group.

    >>> groups = {"a": ["w"], "b": ["v"], "c": ["w", "v"]}
    >>> [list(part) for part in split_groups(groups, MAX_ELEMENTS // 2)]
    [['a', 'b'], ['c']]
    """
    step = max(1, MAX_ELEMENTS // max(1, elements))
    names = list(groups)
    for start in range(0, len(names), step):
        yield GroupSums({name: groups[name] for name in names[start : start + step]})


class GroupSums(dict[str, Sequence[str]]):
    """Groups with the sums of the fields of their parameters' records, [G, ...] in float64.

    >>> from types import SimpleNamespace as Record
    >>> known = {"w": Record(norms=torch.tensor([1.0])), "v": Record(norms=torch.tensor([2.0]))}
    >>> GroupSums({"a": ["w"], "both": ["w", "v"]}).sum(known, "norms").tolist()
    [[1.0], [3.0]]
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        members = [name for group in groups.values() for name in group]
        index = {name: i for i, name in enumerate(dict.fromkeys(members))}
        self.names, self.count = list(index), len(groups)
        self.rows = torch.tensor([row for row, group in enumerate(groups.values()) for _ in group])
        self.columns = torch.tensor([index[name] for name in members])

    @classmethod
    def of(cls, groups: Groups) -> GroupSums:
        """Return the groups themselves where they are made already."""
        return groups if isinstance(groups, GroupSums) else cls(groups)

    def sum_numbers(self, parameters: Mapping[str, Any], *fields: str) -> Tensor:
        """Return the sums of fields that are numbers [fields, G]."""
        values = [[getattr(parameters[name], field) for name in self.names] for field in fields]
        return self.total(torch.tensor(values, dtype=torch.float64).T, self.columns).T

    def sum(self, parameters: Mapping[str, Any], field: str) -> Tensor:
        """Return the sums of a field that is a tensor in every record.

        Args:
            parameters: The record of every parameter, by its name.
            field: Name of a field that is a tensor [...] of one shape.

        Returns:
            The sum over each group [G, ...], float64 on the CPU, in the unit of the field.
        """
        sums = self.sum_known(parameters, field)
        assert sums is not None
        return sums

    def sum_known(self, parameters: Mapping[str, Any], field: str) -> Tensor | None:
        """Return the sums of a tensor field, or None if a parameter lacks it.

        Args:
            parameters: The record of every parameter, by its name.
            field: Name of a field that is a tensor [...] of one shape, or None.

        Returns:
            The sum over each group [G, ...], float64 on the CPU, in the unit of the field. None if
            the field of any parameter is None.
        """
        values = [getattr(parameters[name], field) for name in self.names]
        if any(value is None for value in values):
            return None
        return self.total(torch.stack(values).double().cpu(), self.columns)

    def total(self, values: Tensor, columns: Tensor) -> Tensor:
        """Return the sum of values [M, ...] over each group [G, ...].

        Args:
            values: The values that the sums are of.
            columns: Index of the value of each member, group by group.
        """
        # no product with zeros: an infinite value of one group must not reach the others
        total = values.new_zeros(self.count, *values.shape[1:])
        return total.index_add_(0, self.rows, values.index_select(0, columns))
