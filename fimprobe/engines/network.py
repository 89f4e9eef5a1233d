"""The autograd graph of one forward pass: which edges are parameters, how often each is used."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from torch import Tensor, nn

from fimprobe.engines.edges import Edge
from fimprobe.engines.operators import Norms

VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy"}
MOVES = {"T", "Transpose", "Permute"}
# slots of the input, the weight and the bias
AFFINE = {
    "Addmm": (1, 2, 0),
    "Mm": (0, 1, None),
    "Bmm": (0, 1, None),
    "Convolution": (0, 1, 2),
    "Linear": (0, 1, 2),
}


class Network:
    """The graph of one forward pass, and the twin's parameters in it."""

    def __init__(
        self, twin: nn.Module, outputs: Tensor, size: int, norms: dict[tuple[Any, ...], Norms]
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
            if edge.kind not in MOVES | {"ToCopy", "View"}:
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
