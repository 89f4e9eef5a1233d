"""The autograd graph of one forward pass: its edges, the parameters in it, and their uses."""

from __future__ import annotations

import re
from collections import Counter, deque
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from fimprobe.jacobian_bounds.operator_norms import OperatorNorms

RESHAPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy"}
"""Functions that keep the order of elements."""

TRANSPOSING = {"T", "Transpose", "Permute"}
"""Functions that change the order of dimensions."""

AFFINE = {
    "Addmm": (1, 2, 0),
    "Mm": (0, 1, None),
    "Bmm": (0, 1, None),
    "Convolution": (0, 1, 2),
    "Linear": (0, 1, 2),
}
"""Functions that apply a layer's weight: the slots of the input, the weight and the bias."""


class AutogradGraph:
    """The graph of one forward pass, and the twin's parameters in it.

    Attributes:
        twin: The model.
        size: Samples of the batch.
        norms: Norms of operators that are known already, shared between the parts of a batch.
        addresses: Addresses of the twin's parameters.
        names: Name of each trained parameter, by its id.
        root: The edge of the outputs.
        uses: How many edges of the graph end in each node.
        parameter_uses: How often each trained parameter is used, by its id.
        affine: The edges that apply a trained weight, by the path of the module that owns it.
    """

    def __init__(
        self, twin: nn.Module, outputs: Tensor, size: int, norms: dict[tuple[Any, ...], OperatorNorms]
    ) -> None:
        self.twin, self.size = twin, size
        self.norms = norms
        self.addresses = {p.data_ptr() for p in twin.parameters()}
        self.names = {
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
        self.parameter_uses: Counter[int] = Counter()
        for node in seen:
            edge = Edge(node, 0)
            parameter = self.parameter(edge)
            if parameter is not None:
                # the node is the parameter itself or a transpose of it: count the busiest one
                key = id(parameter)
                self.parameter_uses[key] = max(self.parameter_uses[key], self.uses[node])
            if edge.kind in AFFINE:
                weight = self.parameter(edge.parent(AFFINE[edge.kind][1]))
                if weight is not None:
                    self.affine.setdefault(self.owner(weight), []).append(edge)

    def parameter(self, edge: Edge | None) -> Tensor | None:
        """The trained parameter behind an edge, through transposes and casts only; else None."""
        while edge is not None:
            if hasattr(edge.node, "variable"):
                variable: Tensor = edge.node.variable
                return variable if id(variable) in self.names else None
            if edge.kind not in TRANSPOSING | {"ToCopy", "View"}:
                return None
            edge = edge.parent(0)
        return None

    def owner(self, parameter: Tensor) -> str:
        """Path of the module that owns a trained parameter."""
        return self.names[id(parameter)].rpartition(".")[0]

    def nearest_module(self, edge: Edge) -> str:
        """The nearest module with trained parameters behind an edge, quoted for messages."""
        queue, seen = deque([edge.node]), {edge.node}
        while queue:
            node = queue.popleft()
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.names:
                return repr(self.owner(variable) or self.names[id(variable)])
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    queue.append(following)
        return "the inputs"

    def location(self, edge: Edge, above: str) -> str:
        """The place of a function in the model, for messages.

        Args:
            edge: The function.
            above: The layer that follows it, quoted.
        """
        return f"between {self.nearest_module(edge)} and {above} ({edge.name})"

    def unknown_function(self, edge: Edge, above: str) -> str:
        """The message about a function without a known bound.

        Args:
            edge: The function.
            above: The layer that follows it, quoted.
        """
        between = f"between {self.nearest_module(edge)} and {above}"
        return f"the function {between} is not known ({edge.name})"

    def mixed_samples(self, edge: Edge, above: str) -> str:
        """The message about a function that may couple the samples of a batch.

        Args:
            edge: The function.
            above: The layer that follows it, quoted.
        """
        return f"samples of the batch cannot be separated {self.location(edge, above)}"


class Edge(NamedTuple):
    """Output ``nr`` of the function whose backward is ``node``."""

    node: Any
    nr: int

    @property
    def name(self) -> str:
        """Name of the backward node, without its namespace."""
        return _name(self.node.name())

    @property
    def kind(self) -> str:
        """Name of the function whose backward the node is."""
        return _kind(self.node.name())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor at this edge."""
        return tuple(self.node._input_metadata[self.nr].shape)

    @property
    def saved(self) -> Any:
        """The node, as an untyped object whose ``_saved_*`` attributes can be read."""
        return self.node

    def parent(self, slot: int) -> Edge | None:
        """The edge of one argument of the function; None for a constant."""
        node, nr = self.node.next_functions[slot]
        return None if node is None else Edge(node, nr)

    def parents(self) -> list[Edge]:
        """The edges of all arguments that are no constants."""
        return [Edge(node, nr) for node, nr in self.node.next_functions if node is not None]


@cache
def _name(full: str) -> str:
    return full.rpartition("::")[2]


@cache
def _kind(full: str) -> str:
    return re.sub(r"Backward\d*$", "", _name(full))


def signed(dim: int) -> int:
    """A saved dimension as a signed number: autograd saves negative ones modulo 2⁶⁴."""
    return dim - 2**64 if dim >= 2**63 else dim
