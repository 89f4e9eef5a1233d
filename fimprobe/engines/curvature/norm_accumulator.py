"""Inner products ⟨(R_y u)_θ, (R_z u)_θ⟩ of one parameter θ along random directions u.

Symbols: B samples of the chunk, n vectors with R_y = Σ_a c_ya ∂²h_a, σ sign flips, J directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.curvature.double_backward import EdgeTangents, PulledBackVector
from fimprobe.engines.curvature.fallback_derivatives import (
    EVERYTHING,
    EVERYTHING_FLIPPED,
    WITHIN_CALL,
    WITHIN_CALL_FLIPPED,
    Motion,
)
from fimprobe.engines.curvature.inner_products import dot, flatten_positions, row_products
from fimprobe.engines.curvature.parameter_derivatives import ParameterDerivatives
from fimprobe.engines.layers.lookups import embedding_tokens
from fimprobe.engines.moments.contraction import CPU_CACHE_BYTES, at_least_float32
from fimprobe.engines.problem.weights import GRAM_LIMIT
from fimprobe.engines.tracing.tape import ParameterUse

OfVectors = Callable[[slice, slice], Tensor | None]
"""Maps n vectors and b samples to (R u)_θ [b, n, *shape]; None for zero."""


OuterSum = list[tuple[Tensor, Tensor]]
"""Σ_t a_t x_tᵀ over the positions of all pairs: a [b, T, o] and x [b, T, i]."""


@dataclass(frozen=True, kw_only=True)
class DirectionTangents:
    """Tangents along one direction, for each of n vectors.

    Attributes:
        vectors: The vectors, with their cotangents.
        plain: Tangents along u.
        flipped: Tangents along σu; None if they are not needed.
    """

    vectors: list[PulledBackVector]
    plain: list[EdgeTangents]
    flipped: list[EdgeTangents] | None


@dataclass(kw_only=True)
class NormAccumulator:
    """Inner products of one chunk; one row for each direction.

    Attributes:
        parameter: The parameter θ.
        workspace_bytes: Memory for the per-sample tangents that are formed at once.
        chunk: Results of the current chunk, by the field of
            :class:`fimprobe.statistics.Curvature`: [J, B, n, n], or their diagonals [J, B, n].
    """

    parameter: Tensor
    workspace_bytes: float
    chunk: dict[str, Tensor] = field(default_factory=dict)

    def start_chunk(self, size: int, count: int, labels: int, *, exact: bool) -> None:
        """Forget the last chunk's results.

        Args:
            size: B.
            count: n.
            labels: Number of vectors that are label scores.
            exact: Whether labels are exact; products of different vectors are then needed, up to
                ``GRAM_LIMIT`` labels.
        """
        self.size, self.count = size, count
        self.all_pairs = exact and labels <= GRAM_LIMIT
        self.chunk = {}

    def add_block(
        self, derivatives: ParameterDerivatives, tangents: DirectionTangents, flips: Tensor
    ) -> None:
        """Add ⟨(R_y u)_θ, (R_z σu)_θ⟩ with R within the calls.

        Args:
            derivatives: The derivatives of the parameter in this chunk.
            tangents: Tangents of the n vectors along u and along σu, both of which are needed.
            flips: σ of the parameter for each sample [B].
        """
        assert tangents.flipped is not None
        plain = _of_vectors(derivatives, tangents.plain, tangents.vectors, WITHIN_CALL)
        flipped = _of_vectors(derivatives, tangents.flipped, tangents.vectors, WITHIN_CALL_FLIPPED)
        matrix, lookup = derivatives.matrix_use(), derivatives.lookup_use()
        sides = (tangents.plain, tangents.flipped)
        if matrix is not None:
            gram = self._matrix_block(derivatives, matrix, *sides)
        elif lookup is not None:
            gram = self._lookup_block(derivatives, lookup, *sides)
        else:
            gram = self._per_sample_products(derivatives, plain, flipped)
        self._append("block", gram)
        self._append("signs", flips.double())

    def add_whole(self, derivatives: ParameterDerivatives, tangents: DirectionTangents) -> None:
        """Add the products for all parameters moving at once.

        Args:
            derivatives: The derivatives of the parameter in this chunk.
            tangents: Tangents of the n vectors along u. Those along σu are set for parameters with
                interacting uses: their block across calls needs flips as well.
        """
        plain = _of_vectors(derivatives, tangents.plain, tangents.vectors, EVERYTHING)
        matrix = derivatives.matrix_use()
        if matrix is not None:
            self._append("whole", self._matrix_whole(derivatives, matrix, tangents))
        else:
            self._append("whole", self._per_sample_products(derivatives, plain, None))
        if tangents.flipped is not None:
            flipped = _of_vectors(derivatives, tangents.flipped, tangents.vectors, EVERYTHING_FLIPPED)
            self._append("joint", self._per_sample_products(derivatives, plain, flipped))

    def _matrix_block(
        self,
        derivatives: ParameterDerivatives,
        use: ParameterUse,
        plain: list[EdgeTangents],
        flipped: list[EdgeTangents],
    ) -> Tensor:
        """Products of Σ_t δ̇_t x_tᵀ, where the inputs are fixed."""
        left = derivatives.cotangents_at(use, [t.cotangents for t in plain])
        right = derivatives.cotangents_at(use, [t.cotangents for t in flipped])
        if left is None or right is None:
            return self._empty()
        x = flatten_positions(at_least_float32(use.call.inputs[0]))
        return self._matrix_products(
            [[(flatten_positions(d), x)] for d in left], [[(flatten_positions(d), x)] for d in right]
        )

    def _lookup_block(
        self,
        derivatives: ParameterDerivatives,
        use: ParameterUse,
        plain: list[EdgeTangents],
        flipped: list[EdgeTangents],
    ) -> Tensor:
        """Products of the rows of tokens that occur."""
        gram = self._empty()
        left = derivatives.cotangents_at(use, [t.cotangents for t in plain])
        right = derivatives.cotangents_at(use, [t.cotangents for t in flipped])
        if left is not None and right is not None:
            sample, _, rows = embedding_tokens(use.call, torch.stack(left, 1))
            other_rows = embedding_tokens(use.call, torch.stack(right, 1))[2]
            gram.index_add_(0, sample, self._inner(rows.double(), other_rows.double()))
        return gram

    def _matrix_whole(
        self, derivatives: ParameterDerivatives, use: ParameterUse, tangents: DirectionTangents
    ) -> Tensor:
        """Products of Σ_t (δ̇_t x_tᵀ + δ_t ẋ_tᵀ): two outer products at each position."""
        edges = [vector.edges for vector in tangents.vectors]
        delta_dot = derivatives.cotangents_at(use, [t.cotangents for t in tangents.plain])
        delta = derivatives.cotangents_at(use, edges)
        x = flatten_positions(at_least_float32(use.call.inputs[0]))
        moved: dict[int, Tensor | None] = {}
        for t in tangents.plain:  # vectors share their ẋ
            if id(t.inputs) not in moved:
                at_use = derivatives.input_tangents(use, t)
                x_dot = None if at_use is None else at_use[0]
                moved[id(t.inputs)] = None if x_dot is None else flatten_positions(x_dot)
        sums: list[OuterSum] = []
        for y, t in enumerate(tangents.plain):
            terms = [] if delta_dot is None else [(flatten_positions(delta_dot[y]), x)]
            x_dot = moved[id(t.inputs)]
            if delta is not None and x_dot is not None:
                terms.append((flatten_positions(delta[y]), x_dot))
            sums.append(terms)
        return self._matrix_products(sums, sums)

    def _matrix_products(self, left: list[OuterSum], right: list[OuterSum]) -> Tensor:
        """⟨Σ_t a_t x_tᵀ, Σ_s b_s z_sᵀ⟩ = Σ_ts (a_t·b_s)(x_t·z_s) for each pair of vectors."""
        gram = self._empty()
        of_inputs: dict[tuple[int, int], Tensor] = {}
        for i, j in itertools.product(range(self.count), repeat=2):
            if self.all_pairs:
                gram[:, i, j] = _inner_product(left[i], right[j], of_inputs)
            elif i == j:
                gram[:, i] = _inner_product(left[i], right[i], of_inputs)
        return (gram + gram.transpose(1, 2)) / 2 if self.all_pairs else gram

    def _per_sample_products(
        self, derivatives: ParameterDerivatives, plain: OfVectors, flipped: OfVectors | None
    ) -> Tensor:
        """Products of per-sample tangents, for any parameter; ``flipped`` None means ``plain``."""
        gram = self._empty()
        room = self.workspace_bytes / 2
        if self.parameter.device.type == "cpu" and not derivatives.uses.fallback_calls:
            room = min(room, CPU_CACHE_BYTES)
        fitting = int(room / (self.parameter.numel() * 8))  # pairs of a vector and a sample
        at_once = self.count if self.all_pairs else max(1, min(self.count, fitting, GRAM_LIMIT))
        step = max(1, fitting // at_once)
        for start in range(0, self.size, step):
            samples = slice(start, min(start + step, self.size))
            for first in range(0, self.count, at_once):
                vectors = slice(first, min(first + at_once, self.count))
                a = plain(vectors, samples)
                b = a if flipped is None else flipped(vectors, samples)
                if a is None or b is None:
                    continue
                a, b = (x.reshape(*x.shape[:2], -1) for x in (a, b))
                if self.all_pairs:
                    gram[samples] = self._inner(a.double(), b.double())
                else:
                    pairs = zip(a.unbind(1), b.unbind(1), strict=True)
                    gram[samples, vectors] = torch.stack([dot(x, z) for x, z in pairs], 1)
        return gram

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Products [b, n, n], symmetrised, or [b, n] of a and b [b, n, P].

        ⟨R_y u, R_z σu⟩ is symmetric in y and z in expectation only.
        """
        if not self.all_pairs:
            return (a * b).sum(-1)
        gram = a @ b.transpose(1, 2)
        return (gram + gram.transpose(1, 2)) / 2

    def _empty(self) -> Tensor:
        """Zeros [B, n, n], or [B, n]."""
        shape = [self.size, *[self.count] * (2 if self.all_pairs else 1)]
        return torch.zeros(shape, dtype=torch.float64, device=self.parameter.device)

    def _append(self, key: str, value: Tensor) -> None:
        """Append one direction: [J, B, ...]."""
        value = value.unsqueeze(0)
        previous = self.chunk.get(key)
        self.chunk[key] = value if previous is None else torch.cat([previous, value])


def _inner_product(
    left: OuterSum, right: OuterSum, of_inputs: dict[tuple[int, int], Tensor]
) -> Tensor | float:
    """⟨Σ_t a_t x_tᵀ, Σ_s b_s z_sᵀ⟩ = Σ_ts (a_t·b_s)(x_t·z_s) of each sample, float64 [b].

    Args:
        left: Pairs of a and x.
        right: Pairs of b and z.
        of_inputs: Receives x_t·z_s by the identities of x and z, which other sums share.
    """
    total: Tensor | float = 0.0
    for k, (a, x) in enumerate(left):
        for m, (b, z) in enumerate(right):
            if left is right and m < k:  # equals that of m and k
                continue
            if (id(x), id(z)) not in of_inputs:
                of_inputs[id(x), id(z)] = row_products(x, z)
            product = (row_products(a, b) * of_inputs[id(x), id(z)]).sum((1, 2))
            total = total + (2 * product if left is right and m > k else product)
    return total


def _of_vectors(
    derivatives: ParameterDerivatives,
    tangents: list[EdgeTangents],
    vectors: list[PulledBackVector],
    motion: Motion,
) -> OfVectors:
    """(R u)_θ as a function of the vectors and the samples."""

    def evaluate(some: slice, samples: slice) -> Tensor | None:
        """(R u)_θ [b, n, *shape]; None for zero.

        Args:
            some: The n vectors.
            samples: The b samples.
        """
        return derivatives.gradient_tangents(tangents[some], vectors[some], samples, motion)

    return evaluate
