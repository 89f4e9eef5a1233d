"""The autograd graph of one forward pass: which edges are parameters, how often each is used."""

from __future__ import annotations

import re
from collections import Counter, deque
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from fimprobe.jacobian_bounds.operator_norms import OperatorNorms

RESHAPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy"}


TRANSPOSING = {"T", "Transpose", "Permute"}


# slots of the input, the weight and the bias
AFFINE = {
    "Addmm": (1, 2, 0),
    "Mm": (0, 1, None),
    "Bmm": (0, 1, None),
    "Convolution": (0, 1, 2),
    "Linear": (0, 1, 2),
}


class AutogradGraph:
    """The graph of one forward pass, and the twin's parameters in it."""

    def __init__(
        self, twin: nn.Module, outputs: Tensor, size: int, norms: dict[tuple[Any, ...], OperatorNorms]
    ) -> None:
        self.twin, self.size = twin, size
        self.norms = norms
        self.stored = {p.data_ptr() for p in twin.parameters()}
        self.parameters = {
            id(p): name for name, p in twin.named_parameters(remove_duplicate=True) if p.requires_grad
        }
        self.root = Edge(outputs.grad_fn, outputs.output_nr)
        self.uses: Counter[Any] = Counter({self.root.node: 1})
        self.affine: dict[str, list[Edge]] = {}
        stack, seen = [self.root.node], {self.root.node}
        while stack:
            edge = Edge(stack.pop(), 0)
            for parent in edge.parents():
                self.uses[parent.node] += 1
                if parent.node not in seen:
                    seen.add(parent.node)
                    stack.append(parent.node)
        self.times: Counter[int] = Counter()
        for node in seen:
            edge = Edge(node, 0)
            parameter = self.parameter(edge)
            if parameter is not None:  # itself, or a transpose of it
                self.times[id(parameter)] = max(self.times[id(parameter)], self.uses[node])
            if edge.kind in AFFINE:
                weight = self.parameter(edge.parent(AFFINE[edge.kind][1]))
                if weight is not None:
                    self.affine.setdefault(self.owner(weight), []).append(edge)

    def parameter(self, edge: Edge | None) -> Tensor | None:
        """The trained parameter behind an edge with nothing but transposes and casts between."""
        while edge is not None:
            if hasattr(edge.node, "variable"):
                variable: Tensor = edge.node.variable
                return variable if id(variable) in self.parameters else None
            if edge.kind not in TRANSPOSING | {"ToCopy", "View"}:
                return None
            edge = edge.parent(0)
        return None

    def owner(self, parameter: Tensor) -> str:
        return self.parameters[id(parameter)].rpartition(".")[0]

    def below(self, edge: Edge) -> str:
        """The nearest module behind an edge, for messages."""
        queue, seen = deque([edge.node]), {edge.node}
        while queue:
            node = queue.popleft()
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.parameters:
                return repr(self.owner(variable) or self.parameters[id(variable)])
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    queue.append(following)
        return "the inputs"

    def between(self, edge: Edge, above: str) -> str:
        return f"between {self.below(edge)} and {above} ({edge.name})"

    def unknown(self, edge: Edge, above: str) -> str:
        return f"the function between {self.below(edge)} and {above} is not known ({edge.name})"

    def mixes(self, edge: Edge, above: str) -> str:
        return f"samples of the batch cannot be told apart {self.between(edge, above)}"


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
