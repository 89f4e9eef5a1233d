"""The walk from the outputs down the graph that gives every layer its bounds, or the reason."""

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
from fimprobe.jacobian_bounds.path import PathNorm, Unbounded, outer_moved, scaled
from fimprobe.jacobian_bounds.spectral_norm import ROUNDING
from fimprobe.jacobian_bounds.tensor_functions import branches, copied_or_summed, normalised

ELSEWHERE = "its outputs are parameters of another function"


CALLED = {
    "Softmax": "softmax between layers",
    "LogSoftmax": "log-softmax between layers",
}


class BoundPropagation:
    """From the outputs down every path, until a fork or a function that is not known."""

    def __init__(self, net: AutogradGraph) -> None:
        self.net = net
        self.found: dict[str, tuple[LayerBound, set[int]]] = {}
        self.reasons: dict[int, str] = {}
        self.flooded: set[Any] = set()
        one = torch.ones(net.size, dtype=torch.float64)
        self.walk(net.root, PathNorm(one, one))

    def walk(self, root: Edge, path: PathNorm) -> None:
        """Give every layer on the way its bounds; everything beyond a stop the stop's reason."""
        stack = [(root, path)]
        while stack:
            edge, path = stack.pop()
            if hasattr(edge.node, "variable"):
                continue
            try:
                if self.net.uses[edge.node] > path.edges:
                    times = self.net.uses[edge.node]
                    raise Unbounded(f"the output of {self.net.below(edge)} is used {times} times")
                numel = math.prod(edge.shape)
                if numel % (path.outer * self.net.size):
                    raise Unbounded(self.net.mixes(edge, path.above))
                if not edge.node._input_metadata[edge.nr].dtype.is_floating_point:
                    raise Unbounded(self.net.unknown(edge, path.above))
                path = replace(path, dims=min(path.dims, numel // self.net.size), edges=1)
                onward = self.step(edge, path)
            except Unbounded as stop:
                self.mark_unbounded([edge], str(stop))
                continue
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # checkpointed, or changed in place since
                self.mark_unbounded([edge], f"what {edge.name} saved cannot be read")
                continue
            stack += onward
            walked = {following.node for following, _ in onward}
            self.mark_unbounded([p for p in edge.parents() if p.node not in walked], ELSEWHERE)

    def mark_unbounded(self, edges: list[Edge], reason: str) -> None:
        """Note why everything from here to the input has no bounds."""
        stack = [edge.node for edge in edges]
        while stack:
            node = stack.pop()
            if node is None or node in self.flooded:
                continue
            self.flooded.add(node)
            if hasattr(node, "variable"):
                self.reasons.setdefault(id(node.variable), reason)
            stack += [following for following, _ in node.next_functions]

    def step(self, edge: Edge, path: PathNorm) -> list[tuple[Edge, PathNorm]]:
        """One node: the edges behind it with what is known of the outputs' derivative there."""
        kind, parent = edge.kind, edge.parent(0) if edge.node.next_functions else None
        if kind in AFFINE:
            return self.affine_step(edge, path)
        if kind in RESHAPING:
            return [] if parent is None else [(parent, path)]
        path_after = replace(path, bias=None)
        if kind in TRANSPOSING:
            assert parent is not None
            return [(parent, replace(path_after, outer=outer_moved(self.net, edge, path)))]
        if kind in LIPSCHITZ:
            if parent is None:
                return []
            return [(parent, scaled(self.net, path_after, LIPSCHITZ[kind](edge.saved), edge))]
        if kind in GATHERING or kind in AVERAGING:
            if parent is None:
                return []
            return [(parent, copied_or_summed(self.net, edge, parent, path_after))]
        if kind in ("NativeLayerNorm", "NativeGroupNorm"):
            return [] if parent is None else [(parent, normalised(self.net, edge, path_after))]
        if kind in ELEMENTWISE or (kind in BATCH_NORMS and not edge.saved._saved_training):
            return elementwise(
                self.net, edge, path, lambda bias: self.layer(edge, path_after, None, bias)
            )
        if kind == "Cat":
            return branches(self.net, edge, path_after)
        if kind in CALLED:
            raise Unbounded(CALLED[kind])
        if "Attention" in kind:
            raise Unbounded("attention")
        raise Unbounded(self.net.unknown(edge, path.above))

    def affine_step(self, edge: Edge, path: PathNorm) -> list[tuple[Edge, PathNorm]]:
        """A layer z = X̃ Wᵀ: its own bounds, and its operator for what comes before it."""
        data, weight_slot, bias_slot = AFFINE[edge.kind]
        node, parent = edge.node, edge.parent(data)
        weight = self.net.parameter(edge.parent(weight_slot))
        bias = None if bias_slot is None else self.net.parameter(edge.parent(bias_slot))
        if edge.kind == "Bmm" and (parent is None or edge.parent(weight_slot) is not None):
            raise Unbounded(f"two activations are multiplied {self.net.between(edge, path.above)}")
        plain = edge.kind != "Addmm" or node._saved_alpha == node._saved_beta == 1
        turned = parent is not None and self.net.parameter(parent) is not None
        turned = turned or (parent is None and weight is None and bias is None)
        if not plain or turned or (edge.kind == "Convolution" and node._saved_transposed):
            raise Unbounded(self.net.unknown(edge, path.above))
        width = edge.shape[1 if edge.kind == "Convolution" else -1]
        if bias is None and weight is not None and path.bias is not None:
            bias = path.bias if self.net.owner(path.bias) == self.net.owner(weight) else None
        if bias is not None and bias.shape != (width,):
            bias = None
        rows = edge.shape[:1] if edge.kind == "Convolution" else edge.shape[:-1]
        if math.prod(rows) % (path.outer * self.net.size):
            raise Unbounded(self.net.mixes(edge, path.above))
        named = weight if weight is not None else bias
        if named is not None:
            self.layer(edge, replace(path, bias=None), weight, bias)
        if parent is None:
            return []
        norms = operator_norms(self.net, edge)
        if norms is None:
            raise Unbounded(self.net.unknown(edge, path.above))
        ratio = norms.frobenius / norms.spectral if norms.spectral else 1.0
        onward = replace(
            path,
            spectral=path.spectral * norms.spectral,
            frobenius_ratio=min(path.frobenius_ratio, ratio),
            unsafe=path.unsafe * norms.frobenius,
            above=path.above if named is None else repr(self.net.owner(named)),
            bias=None,
        )
        return [(parent, onward)]

    def layer(self, edge: Edge, path: PathNorm, weight: Tensor | None, bias: Tensor | None) -> None:
        """Bounds of one layer from the path to its output."""
        inputs, blocks = input_norms(self.net, edge, path.outer, weight is not None, bias is not None)
        trained = [p for p in (weight, bias) if p is not None]
        rank = min(path.dims, sum(p.numel() for p in trained))
        spectral = path.spectral * inputs.spectral * ROUNDING
        frobenius = torch.minimum(
            spectral * min(math.sqrt(rank), path.frobenius_ratio),
            path.spectral * inputs.frobenius * (math.sqrt(blocks) * ROUNDING),
        )
        bound = LayerBound(
            frobenius=frobenius,
            spectral=spectral,
            unsafe_frobenius=path.unsafe * inputs.frobenius,
            input_norm=inputs.spectral,
            activation_constant=path.constant,
        )
        self.found[self.net.owner(trained[0])] = bound, {id(p) for p in trained}

    def result(self) -> dict[str, LayerBound]:
        """Bounds or reasons of every module with trained parameters that were reached."""
        owned: dict[str, list[Tensor]] = {}
        for name, parameter in self.net.twin.named_parameters():
            if self.net.times[id(parameter)]:
                owned.setdefault(name.rpartition(".")[0], []).append(parameter)
        return {path: self.conclude(path, parameters) for path, parameters in owned.items()}

    def conclude(self, path: str, parameters: list[Tensor]) -> LayerBound:
        """A module's bounds, or the reason why there are none."""
        bound, covers = self.found.get(path, (LayerBound(), set()))
        uses = self.net.affine.get(path, [])
        kind = type(self.net.twin.get_submodule(path)).__name__
        again = [p for p in parameters if self.net.times[id(p)] > 1]
        told = next((self.reasons[id(p)] for p in parameters if id(p) in self.reasons), ELSEWHERE)
        reason = None
        if not uses and not covers:
            if kind not in ("Linear", "Conv1d", "Conv2d", "Conv3d", "ParametrizationList"):
                reason = f"the bounds are for Linear and Conv1d to Conv3d layers; this is {kind}"
            else:
                reason = "its weight is computed" if told == ELSEWHERE else told
        elif again:
            local = self.net.parameters[id(again[0])].rpartition(".")[2]
            reason = (
                f"its {local} is used {self.net.times[id(again[0])]} times (tied or called again)"
            )
        elif not covers:
            reason = told
        elif covers != {id(p) for p in parameters}:
            reason = f"this {kind} has parameters besides one weight and its bias"
        try:
            norms = (
                operator_norms(self.net, uses[0], compute_spectral=False) if len(uses) == 1 else None
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what its node saved cannot be read
            norms = None
        bound = bound if reason is None else LayerBound(reason=reason)
        if norms is not None:
            bound = replace(bound, weight_frobenius_norm=norms.frobenius)
        if norms is not None and norms.spectral < math.inf:
            bound = replace(bound, weight_spectral_norm=norms.spectral)
        return bound
