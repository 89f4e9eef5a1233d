"""Inner products ⟨(R_y u)_θ, (R_z u)_θ⟩ of one parameter θ along random directions u.

Symbols: B samples of the chunk, n vectors with R_y = Σ_a c_ya ∂²h_a, σ sign flips, J directions.
"""

from __future__ import annotations

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
from fimprobe.engines.moments.contraction import at_least_float32
from fimprobe.engines.problem.weights import GRAM_LIMIT
from fimprobe.engines.tracing.tape import ParameterUse

PerVector = Callable[[int, slice], Tensor | None]
"""Maps the number of a vector and b samples to (R u)_θ [b, 1, *shape]; None for zero."""


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
        plain = _per_vector(derivatives, tangents.plain, tangents.vectors, WITHIN_CALL)
        flipped = _per_vector(derivatives, tangents.flipped, tangents.vectors, WITHIN_CALL_FLIPPED)
        matrix, lookup = derivatives.matrix_use(), derivatives.lookup_use()
        sides = (tangents.plain, tangents.flipped)
        if matrix is not None:
            gram = self._matrix_block(derivatives, matrix, *sides)
        elif lookup is not None:
            gram = self._lookup_block(derivatives, lookup, *sides)
        else:
            gram = self._per_sample_products(plain, flipped)
        self._append("block", gram)
        self._append("signs", flips.double())

    def add_whole(self, derivatives: ParameterDerivatives, tangents: DirectionTangents) -> None:
        """Add the products for all parameters moving at once.

        Args:
            derivatives: The derivatives of the parameter in this chunk.
            tangents: Tangents of the n vectors along u. Those along σu are set for parameters with
                interacting uses: their block across calls needs flips as well.
        """
        plain = _per_vector(derivatives, tangents.plain, tangents.vectors, EVERYTHING)
        matrix = derivatives.matrix_use()
        if matrix is not None:
            self._append("whole", self._matrix_whole(derivatives, matrix, tangents))
        else:
            self._append("whole", self._per_sample_products(plain, None))
        if tangents.flipped is not None:
            flipped = _per_vector(derivatives, tangents.flipped, tangents.vectors, EVERYTHING_FLIPPED)
            self._append("joint", self._per_sample_products(plain, flipped))

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
        x = [flatten_positions(at_least_float32(use.call.inputs[0]))] * self.count
        rows = [flatten_positions(v) for v in left]
        other_rows = [flatten_positions(v) for v in right]
        return self._matrix_products(rows, other_rows, x, x)

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
        like = delta_dot or delta
        if like is None:
            return self._empty()
        x = flatten_positions(at_least_float32(use.call.inputs[0]))
        left, right = [], []
        for y in range(self.count):
            moved = derivatives.input_tangents(use, tangents.plain[y])
            rows = [flatten_positions(like[y] * 0 if delta_dot is None else delta_dot[y])]
            columns = [x]
            if delta is not None and moved is not None and moved[0] is not None:
                rows.append(flatten_positions(delta[y]))
                columns.append(flatten_positions(moved[0]))
            left.append(torch.cat(rows, 1))
            right.append(torch.cat(columns, 1))
        return self._matrix_products(left, left, right, right)

    def _matrix_products(
        self, a: list[Tensor], b: list[Tensor], x: list[Tensor], z: list[Tensor]
    ) -> Tensor:
        """⟨Σ_t a_t x_tᵀ, Σ_s b_s z_sᵀ⟩ = Σ_ts (a_t·b_s)(x_t·z_s) for each pair of vectors."""
        gram = self._empty()
        for i, (left, left_inputs) in enumerate(zip(a, x, strict=True)):
            for j, (right, right_inputs) in enumerate(zip(b, z, strict=True)):
                if self.all_pairs or i == j:
                    products = row_products(left, right) * row_products(left_inputs, right_inputs)
                    pair = (slice(None), i, j) if self.all_pairs else (slice(None), i)
                    gram[pair] = products.sum((1, 2))
        return (gram + gram.transpose(1, 2)) / 2 if self.all_pairs else gram

    def _per_sample_products(self, plain: PerVector, flipped: PerVector | None) -> Tensor:
        """Products of per-sample tangents, for any parameter; ``flipped`` None means ``plain``."""
        gram = self._empty()
        count = self.count if self.all_pairs else 1
        step = max(1, int(self.workspace_bytes / (2 * count * self.parameter.numel() * 8)))
        for start in range(0, self.size, step):
            samples = slice(start, min(start + step, self.size))
            if self.all_pairs:
                a = self._stack_vectors(plain, samples)
                b = a if flipped is None else self._stack_vectors(flipped, samples)
                if a is not None and b is not None:
                    gram[samples] = self._inner(a, b)
                continue
            for y in range(self.count):
                a = plain(y, samples)
                b = a if flipped is None else flipped(y, samples)
                if a is not None and b is not None:
                    gram[samples, y] = dot(a.flatten(1), b.flatten(1))
        return gram

    def _stack_vectors(self, per_vector: PerVector, samples: slice) -> Tensor | None:
        """The tangents of all vectors, float64 [b, n, P]; None for zero."""
        tangents = [per_vector(y, samples) for y in range(self.count)]
        like = next((t for t in tangents if t is not None), None)
        if like is None:
            return None
        filled = [torch.zeros_like(like) if t is None else t for t in tangents]
        stacked = torch.cat(filled, 1).double()
        return stacked.reshape(*stacked.shape[:2], -1)

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


def _per_vector(
    derivatives: ParameterDerivatives,
    tangents: list[EdgeTangents],
    vectors: list[PulledBackVector],
    motion: Motion,
) -> PerVector:
    """(R_y u)_θ as a function of y and the samples."""

    def evaluate(y: int, samples: slice) -> Tensor | None:
        """(R_y u)_θ [b, 1, *shape] of b samples; None for zero.

        Args:
            y: Number of the vector.
            samples: The b samples.
        """
        return derivatives.gradient_tangents(tangents[y], vectors[y], samples, motion)

    return evaluate
