"""Curvature propagation: probes of the diagonal of R with less noise where a model has norms.

R is a sum over the operations m that bend, R = Σ_m J_mᵀ Q_m J_m, with J_m the derivative of the input
of m in the parameters. Vectors a_m and b_m with E a_m b_mᵀ = Q_m, independent and with mean zero, are
pulled back to the calls: α = Σ_m J_mᵀ a_m and β = Σ_m J_mᵀ b_m have E α βᵀ = R. A probe of signs at
all calls has the noise of all of R in each of its entries instead. See Martens, Sutskever & Swersky
(2012) and docs/theory.md, "Curvature propagation".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.curvature.diagonal_accumulator import ProbeTerm
from fimprobe.engines.curvature.directions import OptionalTensors, random_edge_direction
from fimprobe.engines.curvature.double_backward import EdgeTangents
from fimprobe.engines.curvature.graph_regions import Region, find_regions, leaf_edge
from fimprobe.engines.curvature.norm_curvature import NormNode, curvature_vectors
from fimprobe.engines.curvature.propagation_check import agrees_with_double_backward
from fimprobe.engines.curvature.region_gradients import RegionGradients, pull_back_regions
from fimprobe.engines.primitives.random_signs import rademacher
from fimprobe.engines.tracing.chunk import Chunk


@dataclass(frozen=True, kw_only=True)
class ReusedCalls:
    """Calls whose parameters have uses that depend on each other.

    Attributes:
        inputs: Their input edges.
        outputs: Their output edges.
    """

    inputs: list[int]
    outputs: set[int]


class CurvaturePropagation:
    """Finds the norms and regions of a chunk's graph, and draws probes of diag R from them."""

    def __init__(
        self, chunk: Chunk, norms: list[NormNode], regions: list[Region], reused: ReusedCalls
    ) -> None:
        self._chunk, self._norms, self._regions = chunk, norms, regions
        self._reused = reused
        self._scales: dict[int, Tensor] = {}

    @classmethod
    def of(
        cls, chunk: Chunk, vectors: list[Tensor], reused: ReusedCalls
    ) -> CurvaturePropagation | None:
        """Analyse the graph of a chunk.

        Args:
            chunk: The recorded forward pass.
            vectors: The vectors at the outputs, for which a new plan is verified.
            reused: Calls whose parameters have uses that depend on each other.

        Returns:
            None if the graph has no norm, where other probes are as good, or if the products of the
            sources do not agree with a double backward.
        """
        plan = chunk.plan
        if plan.propagates is False:
            return None
        norms, regions = find_regions(chunk.outputs, chunk.tape)
        if not norms:
            return None
        if plan.propagates is None:
            plan.propagates = agrees_with_double_backward(chunk, vectors, norms, regions)
        return cls(chunk, norms, regions, reused) if plan.propagates else None

    def terms(self, number: int, vector: Tensor, probes: int) -> list[list[ProbeTerm]]:
        """Draw probes for one vector at the outputs.

        Args:
            number: Number of the vector.
            vector: The vector c [B, ...].
            probes: K.

        Returns:
            For each probe, terms whose sum it is.
        """
        at_norms, local = pull_back_regions(self._chunk, vector, self._norms, self._regions)
        terms = []
        for k in range(probes):
            key = f"diagonal {number} {k}"
            parts = [
                self._norm_term(at_norms, key),
                self._entry_term(local, key),
                self._call_term(local, key),
                self._input_term(key),
            ]
            terms.append([part for part in parts if part is not None])
        return terms

    def _norm_term(self, at_norms: dict[NormNode, Tensor], key: str) -> ProbeTerm | None:
        """The curvature of all norms, in closed form."""
        edges, a, b = [], [], []
        for i, norm in enumerate(self._norms):
            if norm in at_norms:
                signs = functools.partial(self._signs, f"{key} norm {i}")
                vectors = curvature_vectors(norm, at_norms[norm], signs)
                edges.append(norm.entry)
                a.append(vectors[0])
                b.append(vectors[1])
        return self._pull_back(edges, a, b)

    def _entry_term(self, local: list[RegionGradients], key: str) -> ProbeTerm | None:
        """The curvature of regions for what happens before them: probes at their entries.

        A layer that is used before a region and inside it as well has a part in the curvature between
        both: such regions are probed at their calls at the same time.
        """
        edges, a, b = [], [], []
        at_calls: dict[int, tuple[Tensor, Tensor]] = {}
        for i, gradients in enumerate(local):
            at_entry = gradients.gradients[0]
            if gradients.region.norm is None or at_entry is None:
                continue
            scale = self._scale(gradients, at_entry)
            w = self._signs(key, f"entry {i}", at_entry)
            signs = [w / scale]
            if self._is_joint(gradients):
                signs += self._signs_at_calls(gradients, key)
            bent = gradients.curvature_along(slice(0, len(signs)), signs)
            if bent[0] is not None:
                edges.append(gradients.points[0])
                a.append(w * scale)
                b.append(bent[0])
            calls = zip(gradients.region.calls, signs[1:], bent[1:], strict=False)
            at_calls |= {e: (sign, along) for e, sign, along in calls if along is not None}
        term = self._pull_back(edges, a, b)
        if term is None and at_calls:
            nothing: OptionalTensors = [None] * len(self._chunk.tape.output_edges)
            term = ProbeTerm(left=nothing, right=self._tangents(list(nothing)))
        for e, (sign, along) in at_calls.items():
            assert term is not None
            term.left[e] = _sum(term.left[e], sign)
            term.right.cotangents[e] = _sum(term.right.cotangents[e], along)
        return term

    def _is_joint(self, gradients: RegionGradients) -> bool:
        """Whether a layer inside the region is used elsewhere, too, and bends there."""
        if gradients.region.norm is None or gradients.gradients[0] is None:
            return False
        return any(
            g is not None and e in self._reused.outputs
            for e, g in zip(gradients.region.calls, gradients.gradients[1:], strict=True)
        )

    def _scale(self, gradients: RegionGradients, at_entry: Tensor) -> Tensor:
        """A factor for each sample that makes a and b of a region as large as each other.

        The noise of several regions is least if all have the same ratio of a to b. The factor must
        not depend on the probe: it comes from one of its own, for the first vector.
        """
        key = id(gradients.region.norm)
        if key not in self._scales:
            signs = self._signs("scale", "of a region", at_entry)
            (bent,) = gradients.curvature_along(slice(0, 1), [signs])
            rows = self._samples_in(at_entry)
            size = at_entry.new_zeros(rows, dtype=torch.float64)
            if bent is not None:
                size = bent.double().reshape(rows, -1).square().mean(1) ** 0.25
            largest = torch.finfo(at_entry.dtype).max ** 0.25
            size = size.where((size > 0) & size.isfinite(), 1.0).clamp(1 / largest, largest)
            places = at_entry.reshape(rows, -1).shape[1]
            scale = size.to(at_entry.dtype).unsqueeze(1).expand(rows, places)
            self._scales[key] = scale.reshape(at_entry.shape)
        return self._scales[key]

    def _call_term(self, local: list[RegionGradients], key: str) -> ProbeTerm | None:
        """The curvature of each region for the calls inside it: probes at their outputs."""
        count = len(self._chunk.tape.output_edges)
        left: OptionalTensors = [None] * count
        right: OptionalTensors = [None] * count
        for gradients in local:
            if self._is_joint(gradients):
                continue
            signs = self._signs_at_calls(gradients, key)
            calls = slice(len(gradients.points) - len(signs), None)
            for e, sign, along in zip(
                gradients.region.calls, signs, gradients.curvature_along(calls, signs), strict=True
            ):
                if along is not None:
                    left[e], right[e] = sign, along
        if all(w is None for w in left):
            return None
        return ProbeTerm(left=left, right=self._tangents(right))

    def _signs_at_calls(self, gradients: RegionGradients, key: str) -> list[Tensor]:
        """Signs at the outputs of a region's calls; anything where it is straight."""
        calls = gradients.region.calls
        at_calls = gradients.gradients[len(gradients.points) - len(calls) :]
        nothing = torch.zeros(())
        return [
            nothing if g is None else random_edge_direction(self._chunk, e, g, f"{key} call {e}")
            for e, g in zip(calls, at_calls, strict=True)
        ]

    def _input_term(self, key: str) -> ProbeTerm | None:
        """Twice the derivative of a use's gradient in its input, which its parameter moves itself."""
        if not self._reused.inputs:
            return None
        tape = self._chunk.tape
        inputs: OptionalTensors = [None] * len(tape.input_edges)
        edges, moves = [], []
        for i in self._reused.inputs:
            edge = tape.input_edges[i]
            edge = leaf_edge(edge) if isinstance(edge, Tensor) else edge
            metadata = edge.node._input_metadata[edge.output_nr]
            like = torch.empty(metadata.shape, dtype=metadata.dtype, device=metadata.device)
            inputs[i] = self._signs(key, f"input {i}", like)
            edges.append(edge)
            moves.append(inputs[i])
        left = _pull_back(edges, moves, tape.output_edges)
        return ProbeTerm(left=left, right=EdgeTangents([None] * len(tape.output_edges), inputs))

    def _pull_back(self, edges: list[Any], a: list[Tensor], b: list[Tensor]) -> ProbeTerm | None:
        if not edges:
            return None
        output_edges = self._chunk.tape.output_edges
        return ProbeTerm(
            left=_pull_back(edges, a, output_edges),
            right=self._tangents(_pull_back(edges, b, output_edges)),
        )

    def _tangents(self, cotangents: OptionalTensors) -> EdgeTangents:
        return EdgeTangents(cotangents, [None] * len(self._chunk.tape.input_edges))

    def _signs(self, key: str, name: str, like: Tensor) -> Tensor:
        """Draw signs of the shape of a tensor, by sample where these come first."""
        problem, size, key = self._chunk.problem, self._chunk.size, f"{key} {name}"
        first = problem.draws.first + self._chunk.rows.start
        rows = self._samples_in(like)
        if rows != size:
            first, key = 0, f"{key} {first}"
        shape = (rows, like.numel() // rows)
        signs = rademacher(
            shape, key, problem.draws.seed, first=first, dtype=like.dtype, device=like.device
        )
        return signs.reshape(like.shape)

    def _samples_in(self, x: Tensor) -> int:
        """The number of samples, if they may come first in a tensor; else 1."""
        size = self._chunk.size
        return size if x.dim() > 0 and x.shape[0] % size == 0 else 1


def _pull_back(edges: list[Any], cotangents: list[Any], output_edges: list[Any]) -> OptionalTensors:
    """Pull cotangents at places of the graph back to the calls' outputs."""
    pulled = torch.autograd.grad(
        edges, output_edges, cotangents, retain_graph=True, allow_unused=True
    )
    return list(pulled)


def _sum(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total + x
