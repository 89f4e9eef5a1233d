"""Bounds of every layer, propagated from the outputs down the autograd graph."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.jacobian_bounds.affine_layers import input_norms, operator_norms
from fimprobe.jacobian_bounds.elementwise import elementwise
from fimprobe.jacobian_bounds.graph import AFFINE, RESHAPING, TRANSPOSING, AutogradGraph, Edge
from fimprobe.jacobian_bounds.layer_bound import LayerBound
from fimprobe.jacobian_bounds.lipschitz_constants import (
    AVERAGING,
    BATCH_NORMS,
    ELEMENTWISE,
    GATHERING,
    LIPSCHITZ,
)
from fimprobe.jacobian_bounds.path import PathNorm, Unbounded, outer_transposed, scaled
from fimprobe.jacobian_bounds.spectral_norm import ROUNDING
from fimprobe.jacobian_bounds.tensor_functions import branches, copied_or_summed, normalised

ELSEWHERE = "its outputs are parameters of another function"
"""The reason for layers that compute an argument other than the data of a function."""

SOFTMAXES = {
    "Softmax": "softmax between layers",
    "LogSoftmax": "log-softmax between layers",
}
"""Functions that are known and have no useful bound, with the reason that is reported."""

LAYER_NORMS = {"NativeLayerNorm", "NativeGroupNorm"}

UNARY = {*RESHAPING, *TRANSPOSING, *LIPSCHITZ, *GATHERING, *AVERAGING, *LAYER_NORMS}
"""Functions of one tensor, whose norm :meth:`BoundPropagation._behind_unary` knows."""

Steps = list[tuple[Edge, PathNorm]]
"""Edges to visit next, each with the norm of the path to it."""


class BoundPropagation:
    """Bounds along every path from the outputs, down to a fork or an unknown function.

    Attributes:
        graph: The autograd graph.
        bounds: The bounds of a module by its path, with the ids of the parameters that they cover.
        reasons: Why the path to a parameter ends before it, by the parameter's id.
    """

    def __init__(self, graph: AutogradGraph) -> None:
        self.graph = graph
        self.bounds: dict[str, tuple[LayerBound, set[int]]] = {}
        self.reasons: dict[int, str] = {}
        self._unbounded: set[Any] = set()
        self._propagate(PathNorm(spectral=torch.ones(graph.size, dtype=torch.float64)))

    def result(self) -> dict[str, LayerBound]:
        """Bounds, or the reason for their absence, of every module whose parameters are used."""
        owned: dict[str, list[Tensor]] = {}
        for name, parameter in self.graph.twin.named_parameters():
            if self.graph.parameter_uses[id(parameter)]:
                owned.setdefault(name.rpartition(".")[0], []).append(parameter)
        return {path: self._bound_of(path, parameters) for path, parameters in owned.items()}

    def _propagate(self, path: PathNorm) -> None:
        """Bound every layer on the paths from the outputs; mark all that lies behind an end."""
        stack = [(self.graph.root, path)]
        while stack:
            edge, path = stack.pop()
            if hasattr(edge.node, "variable"):
                continue
            try:
                onward = self._step(edge, self._enter(edge, path))
            except Unbounded as end:
                self._mark_unbounded([edge], str(end))
                continue
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # checkpointed, or changed in place since
                self._mark_unbounded([edge], f"what {edge.name} saved cannot be read")
                continue
            stack += onward
            visited = {following.node for following, _ in onward}
            others = [p for p in edge.parents() if p.node not in visited]
            self._mark_unbounded(others, ELSEWHERE)

    def _enter(self, edge: Edge, path: PathNorm) -> PathNorm:
        """The path at a node, once it is certain that the path may go on there.

        Raises:
            Unbounded: At a fork, at whole numbers, or where the samples are not separate.
        """
        graph = self.graph
        if graph.uses[edge.node] > path.edges:
            times = graph.uses[edge.node]
            raise Unbounded(f"the output of {graph.nearest_module(edge)} is used {times} times")
        numel = math.prod(edge.shape)
        if numel % (path.outer * graph.size):
            raise Unbounded(graph.mixed_samples(edge, path.above))
        if not edge.node._input_metadata[edge.nr].dtype.is_floating_point:
            raise Unbounded(graph.unknown_function(edge, path.above))
        return replace(path, dims=min(path.dims, numel // graph.size), edges=1)

    def _mark_unbounded(self, edges: list[Edge], reason: str) -> None:
        """Note why nothing from these edges down to the inputs has bounds."""
        stack = [edge.node for edge in edges]
        while stack:
            node = stack.pop()
            if node is None or node in self._unbounded:
                continue
            self._unbounded.add(node)
            if hasattr(node, "variable"):
                self.reasons.setdefault(id(node.variable), reason)
            stack += [following for following, _ in node.next_functions]

    def _step(self, edge: Edge, path: PathNorm) -> Steps:
        """The edges behind one node, with the norms of the paths to them."""
        kind = edge.kind
        if kind in AFFINE:
            return self._behind_affine(edge, path)
        without_bias = replace(path, bias=None)
        if kind in ELEMENTWISE or (kind in BATCH_NORMS and not edge.saved._saved_training):
            return elementwise(
                self.graph,
                edge,
                path,
                lambda bias: self._bound_layer(edge, without_bias, None, bias),
            )
        if kind == "Cat":
            return branches(self.graph, edge, without_bias)
        if kind in SOFTMAXES:
            raise Unbounded(SOFTMAXES[kind])
        if "Attention" in kind:
            raise Unbounded("attention")
        if kind not in UNARY:
            raise Unbounded(self.graph.unknown_function(edge, path.above))
        parent = edge.parent(0) if edge.node.next_functions else None
        return [] if parent is None else [(parent, self._behind_unary(edge, parent, path))]

    def _behind_unary(self, edge: Edge, parent: Edge, path: PathNorm) -> PathNorm:
        """The path behind a function of one tensor."""
        kind = edge.kind
        if kind in RESHAPING:
            return path
        path = replace(path, bias=None)
        if kind in TRANSPOSING:
            return replace(path, outer=outer_transposed(self.graph, edge, path))
        if kind in LIPSCHITZ:
            return scaled(self.graph, path, LIPSCHITZ[kind](edge.saved), edge)
        if kind in LAYER_NORMS:
            return normalised(self.graph, edge, path)
        return copied_or_summed(self.graph, edge, parent, path)

    def _behind_affine(self, edge: Edge, path: PathNorm) -> Steps:
        """Bound a layer z = X̃ Wᵀ; the path behind its operator."""
        graph = self.graph
        data, weight_slot, bias_slot = AFFINE[edge.kind]
        parent, weight = edge.parent(data), graph.parameter(edge.parent(weight_slot))
        bias = None if bias_slot is None else graph.parameter(edge.parent(bias_slot))
        self._check_affine(edge, path, weight, bias)
        width = edge.shape[1 if edge.kind == "Convolution" else -1]
        if bias is None and weight is not None and path.bias is not None:
            bias = path.bias if graph.owner(path.bias) == graph.owner(weight) else None
        if bias is not None and bias.shape != (width,):
            bias = None
        named = weight if weight is not None else bias
        if named is not None:
            self._bound_layer(edge, replace(path, bias=None), weight, bias)
        if parent is None:
            return []
        norms = operator_norms(graph, edge)
        if norms is None:
            raise Unbounded(graph.unknown_function(edge, path.above))
        ratio = norms.frobenius / norms.spectral if norms.spectral else 1.0
        onward = replace(
            path,
            spectral=path.spectral * norms.spectral,
            frobenius_ratio=min(path.frobenius_ratio, ratio),
            above=path.above if named is None else repr(graph.owner(named)),
            bias=None,
        )
        return [(parent, onward)]

    def _check_affine(
        self, edge: Edge, path: PathNorm, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Raise Unbounded unless the product is that of data with a weight, sample by sample."""
        graph, node = self.graph, edge.node
        data, weight_slot, _ = AFFINE[edge.kind]
        parent = edge.parent(data)
        if edge.kind == "Bmm" and (parent is None or edge.parent(weight_slot) is not None):
            raise Unbounded(f"two activations are multiplied {graph.location(edge, path.above)}")
        unscaled = edge.kind != "Addmm" or node._saved_alpha == node._saved_beta == 1
        # W x instead of x Wᵀ: the weight is where the data belong
        swapped = parent is not None and graph.parameter(parent) is not None
        swapped = swapped or (parent is None and weight is None and bias is None)
        if not unscaled or swapped or (edge.kind == "Convolution" and node._saved_transposed):
            raise Unbounded(graph.unknown_function(edge, path.above))
        rows = edge.shape[:1] if edge.kind == "Convolution" else edge.shape[:-1]
        if math.prod(rows) % (path.outer * graph.size):
            raise Unbounded(graph.mixed_samples(edge, path.above))

    def _bound_layer(
        self, edge: Edge, path: PathNorm, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Bound one layer, from the norm of the path to its output."""
        graph = self.graph
        inputs, blocks = input_norms(graph, edge, path.outer, weight is not None, bias is not None)
        trained = [p for p in (weight, bias) if p is not None]
        rank = min(path.dims, sum(p.numel() for p in trained))
        spectral = path.spectral * inputs.spectral * ROUNDING
        frobenius = torch.minimum(
            spectral * min(math.sqrt(rank), path.frobenius_ratio),
            path.spectral * inputs.frobenius * (math.sqrt(blocks) * ROUNDING),
        )
        bound = LayerBound(frobenius=frobenius, spectral=spectral)
        self.bounds[graph.owner(trained[0])] = bound, {id(p) for p in trained}

    def _bound_of(self, path: str, parameters: list[Tensor]) -> LayerBound:
        """The bounds of a module or the reason for their absence, with the norms of its weight."""
        reason = self._reason(path, parameters)
        bound = LayerBound(reason=reason) if reason is not None else self.bounds[path][0]
        uses = self.graph.affine.get(path, [])
        norms = None
        if len(uses) == 1:
            try:
                norms = operator_norms(self.graph, uses[0], compute_spectral=False)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # what its node saved cannot be read
                pass
        if norms is not None:
            bound = replace(bound, weight_frobenius_norm=norms.frobenius)
            if norms.spectral < math.inf:
                bound = replace(bound, weight_spectral_norm=norms.spectral)
        return bound

    def _reason(self, path: str, parameters: list[Tensor]) -> str | None:
        """Why a module has no bounds; None if it has."""
        graph = self.graph
        _, covered = self.bounds.get(path, (None, set()))
        kind = type(graph.twin.get_submodule(path)).__name__
        end = next((self.reasons[id(p)] for p in parameters if id(p) in self.reasons), ELSEWHERE)
        if not graph.affine.get(path) and not covered:
            if kind not in ("Linear", "Conv1d", "Conv2d", "Conv3d", "ParametrizationList"):
                return f"the bounds are for Linear and Conv1d to Conv3d layers; this is {kind}"
            return "its weight is computed" if end == ELSEWHERE else end
        reused = [p for p in parameters if graph.parameter_uses[id(p)] > 1]
        if reused:
            local = graph.names[id(reused[0])].rpartition(".")[2]
            times = graph.parameter_uses[id(reused[0])]
            return f"its {local} is used {times} times (tied or called again)"
        if not covered:
            return end
        if covered != {id(p) for p in parameters}:
            return f"this {kind} has parameters besides one weight and its bias"
        return None
