"""One edge of the autograd graph: a tensor of the forward pass, seen from the outputs."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple


class Edge(NamedTuple):
    """Output ``nr`` of the function whose backward is ``node``."""

    node: Any
    nr: int

    @property
    def name(self) -> str:
        return _name(self.node.name())

    @property
    def kind(self) -> str:
        return _kind(self.node.name())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node._input_metadata[self.nr].shape)

    @property
    def saved(self) -> Any:
        """The node, to read what it saved."""
        return self.node

    def parent(self, slot: int) -> Edge | None:
        node, nr = self.node.next_functions[slot]
        return None if node is None else Edge(node, nr)

    def parents(self) -> list[Edge]:
        return [Edge(node, nr) for node, nr in self.node.next_functions if node is not None]


@cache
def _name(full: str) -> str:
    return full.rpartition("::")[2]


@cache
def _kind(full: str) -> str:
    """The name of the function whose backward it is."""
    return re.sub(r"Backward\d*$", "", _name(full))


def signed(dim: int) -> int:
    """Dimensions are saved as unsigned numbers."""
    return dim - 2**64 if dim >= 2**63 else dim
