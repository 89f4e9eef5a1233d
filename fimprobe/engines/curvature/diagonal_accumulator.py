"""Sums of the diagonal of R of one parameter, from random probes or exact.

Symbols: B samples of the chunk, b of them at once, n vectors c with R = Σ_a c_a ∂²h_a, y the number
of one of them, K probes, r the estimate of one probe, whose mean over probes is diag R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.curvature.directions import ParameterDirection
from fimprobe.engines.curvature.double_backward import EdgeTangents, PulledBackVector
from fimprobe.engines.curvature.fallback_derivatives import (
    COTANGENTS_ONLY,
    TWICE_THE_INPUTS,
    WITHIN_CALL,
    FallbackDerivatives,
)
from fimprobe.engines.curvature.inner_products import in_float32_range, unbiased_square
from fimprobe.engines.curvature.parameter_derivatives import ParameterDerivatives
from fimprobe.engines.layers.lookups import embedding_tokens
from fimprobe.engines.moments.contraction import at_least_float32
from fimprobe.engines.moments.scaling import power_of_two_scale
from fimprobe.engines.primitives.random_signs import rademacher
from fimprobe.engines.tracing.tape import ParameterUse


@dataclass(frozen=True, kw_only=True)
class ProbeTerm:
    """Cotangents at the calls, the product of whose gradients is a part of a probe of diag R.

    Attributes:
        left: α at each output edge; None for zero.
        right: β at each output edge, and what moves the calls' inputs.
    """

    left: list[Tensor | None]
    right: EdgeTangents


@dataclass(frozen=True, kw_only=True)
class DiagonalProbes:
    """K random probes of the diagonal of R for one vector.

    Attributes:
        number: Number y of the vector.
        vector: The vector, with its cotangents.
        terms: For each probe, the terms whose sum it is.
        seed: The random seed.
    """

    number: int
    vector: PulledBackVector
    terms: list[list[ProbeTerm]]
    seed: int


@dataclass(kw_only=True)
class DiagonalAccumulator:
    """Per-sample sums of one chunk, and sums over all chunks for every entry.

    Attributes:
        parameter: The parameter.
        every_entry: Whether sums are kept for every entry.
        workspace_bytes: Memory for the products that are formed at once.
        diagonal: Σ w R_ii over samples and vectors, of every entry.
        diagonal_square: Σ w R_ii², unbiased over probes.
        chunk: Results of the current chunk, by the field of
            :class:`fimprobe.statistics.Curvature`.
    """

    parameter: Tensor
    every_entry: bool
    workspace_bytes: float
    diagonal: Tensor | None = None
    diagonal_square: Tensor | None = None
    chunk: dict[str, Tensor] = field(default_factory=dict)

    def start_chunk(self, size: int, count: int, weights: Tensor, *, self_interacting: bool) -> None:
        """Forget the last chunk's results.

        Args:
            size: B.
            count: n.
            weights: Weights w of R² [B, labels]; vectors beyond have no weight.
            self_interacting: Whether the parameter has uses that depend on each other.
        """
        self.size, self.count, self.weights = size, count, weights
        self.self_interacting = self_interacting
        self.chunk = {}
        if self.every_entry and self.diagonal is None:
            zeros = torch.zeros_like(self.parameter, dtype=torch.float64)
            self.diagonal, self.diagonal_square = zeros.clone(), zeros.clone()

    def add_zero(self, probes: int | None) -> None:
        """Note a zero diagonal, for all vectors.

        Args:
            probes: K; None if the diagonal is exact.
        """
        self.chunk["trace"] = self._zeros(self.size, self.count)
        self.chunk["square"] = self._zeros(self.size, self.count)
        if probes is not None:
            self.chunk["probe_squares"] = self._zeros(self.size, self.count, probes)

    def set_exact_sums(self, samples: slice, trace: Tensor, square: Tensor) -> None:
        """Set the sums of the exact diagonals of R for the first n vectors, after ``add_zero``.

        Args:
            samples: Some b samples of the chunk.
            trace: Σ_i R_ii [n, b].
            square: Σ_i R_ii² [n, b].
        """
        self.chunk["trace"][samples, : len(trace)] = trace.t()
        self.chunk["square"][samples, : len(square)] = square.t()

    def add_exact_entries(self, samples: slice, diagonals: Tensor) -> None:
        """Add the exact diagonals of R for the first n vectors with every entry, after ``add_zero``.

        Args:
            samples: Some b samples of the chunk.
            diagonals: [n, b, *shape].
        """
        r = diagonals.double().flatten(2)
        self.set_exact_sums(samples, r.sum(-1), r.square().sum(-1))
        assert self.diagonal is not None and self.diagonal_square is not None
        for y in filter(self._has_weight, range(len(r))):
            w, shape = self.weights[samples, y].double().unsqueeze(1), self.parameter.shape
            self.diagonal += (w * r[y]).sum(0).view(shape)
            self.diagonal_square += (w * r[y].square()).sum(0).view(shape)

    def add_probes(self, derivatives: ParameterDerivatives, probes: DiagonalProbes) -> None:
        """Add what K probes show of the diagonal of R, for one vector.

        A term with α and β at the layer's output z adds (Σ_t α_to x_ti)(Σ_t β_to x_ti). With random
        signs v for α and their Hessian-vector product Hv for β, it is an unbiased estimate of
        ∂²φ/∂W_oi². See docs/theory.md, "Second derivatives by probes".

        Args:
            derivatives: The derivatives of the parameter in this chunk.
            probes: The K probes; at least two, since the square takes products of different ones.
        """
        if "trace" not in self.chunk:
            self.add_zero(len(probes.terms))
        outer, lookup = derivatives.outer_product_use(), derivatives.lookup_use()
        if outer is not None and not self.self_interacting:
            self._add_outer_products(derivatives, outer, probes)
        elif lookup is not None:
            self._add_lookup(derivatives, lookup, probes)
        else:
            self._add_per_sample(derivatives, probes)

    def _add_per_sample(self, derivatives: ParameterDerivatives, probes: DiagonalProbes) -> None:
        """Products of per-sample gradients, for any parameter."""
        count = len(probes.terms)
        # a reused weight moves its own later inputs x(W): the second derivative of W x has 2 Ẇ ẋ
        motion = TWICE_THE_INPUTS if self.self_interacting else COTANGENTS_ONLY
        bytes_per_sample = 4 * count * self.parameter.numel() * 8
        step = max(1, int(self.workspace_bytes / bytes_per_sample))
        for start in range(0, self.size, step):
            samples = slice(start, min(start + step, self.size))
            products: list[Tensor | None] = [None] * count
            for terms in zip(*probes.terms, strict=True):
                left = derivatives.gradients([term.left for term in terms], samples)
                if left is None:
                    continue
                right = derivatives.gradient_tangents(
                    [term.right for term in terms], [probes.vector] * count, samples, motion
                )
                if right is not None:
                    product = (left * right).unbind(1)
                    products = [_add(p, x) for p, x in zip(products, product, strict=True)]
            if derivatives.uses.fallback_calls:
                products = [
                    self._add_fallback_diagonal(r, derivatives, probes, k, samples)
                    for k, r in enumerate(products)
                ]
            known = [r.reshape(len(r), -1) for r in products if r is not None]
            if known:
                self._add_products(torch.stack(known, 1), samples, probes.number)

    def _add_fallback_diagonal(
        self,
        r: Tensor | None,
        derivatives: ParameterDerivatives,
        probes: DiagonalProbes,
        k: int,
        samples: slice,
    ) -> Tensor | None:
        """Add u∘(∂²(δᵀz)/∂θ² u) of fallback calls, whose outputs z are not affine in θ.

        Probes at z do not show this part of the diagonal, so that u is a probe of its own.
        """
        u = rademacher(
            (1, *self.parameter.shape),
            f"own {probes.number} {k} {derivatives.name}",
            probes.seed,
            dtype=self.parameter.dtype,
            device=self.parameter.device,
        )[0]
        direction = ParameterDirection(values={derivatives.name: u}, flips={})
        along_u = FallbackDerivatives(chunk=derivatives.chunk, direction=direction)
        fixed = EdgeTangents([None] * len(probes.vector.edges), [])
        for local_call in derivatives.uses.fallback_calls:
            g = along_u.tangents(local_call, fixed, probes.vector, samples, WITHIN_CALL)
            if g is not None:
                g = u * g[:, 0]
                r = g if r is None else r + g
        return r

    def _add_outer_products(
        self, derivatives: ParameterDerivatives, use: ParameterUse, probes: DiagonalProbes
    ) -> None:
        """One position: r = (v∘Hv) (x∘x)ᵀ, whose sums factor."""
        products = [v * hv for v, hv in self._probes_at(derivatives, use, probes)]
        if not products:
            return
        y = probes.number
        x2 = at_least_float32(use.call.inputs[0]).square()
        x2_sum, x4_sum = x2.sum(-1).double(), x2.double().square().sum(-1)
        d = torch.stack(products).sum(0).double()
        self.chunk["trace"][:, y] = d.mean(1).sum(-1) * x2_sum
        self.chunk["probe_squares"][:, y] = d.square().sum(-1) * x4_sum.unsqueeze(1)
        self.chunk["square"][:, y] = unbiased_square(d).sum(-1) * x4_sum
        if self.diagonal is not None and self.diagonal_square is not None and self._has_weight(y):
            w = self.weights[:, y].double().unsqueeze(1)
            self.diagonal += (w * d.mean(1)).T @ x2.double()
            self.diagonal_square += (w * unbiased_square(d)).T @ x2.double().square()

    def _add_lookup(
        self, derivatives: ParameterDerivatives, use: ParameterUse, probes: DiagonalProbes
    ) -> None:
        """Lookups: only the rows of tokens that occur differ from zero."""
        total: Tensor | None = None
        for v, hv in self._probes_at(derivatives, use, probes):
            sample, token, left = embedding_tokens(use.call, v)
            total = _add(total, left * embedding_tokens(use.call, hv)[2])
        if total is None:
            return
        y, r = probes.number, total.double()
        self.chunk["trace"][:, y].index_add_(0, sample, r.mean(1).sum(-1))
        self.chunk["square"][:, y].index_add_(0, sample, unbiased_square(r).sum(-1))
        self.chunk["probe_squares"][:, y].index_add_(0, sample, r.square().sum(-1))
        if self.diagonal is not None and self.diagonal_square is not None and self._has_weight(y):
            w = self.weights[:, y].double()[sample].unsqueeze(1)
            self.diagonal.index_add_(0, token, w * r.mean(1))
            self.diagonal_square.index_add_(0, token, w * unbiased_square(r))

    def _probes_at(
        self, derivatives: ParameterDerivatives, use: ParameterUse, probes: DiagonalProbes
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield α and β [B, K, ...] of each term at a use, where they are not zero."""
        for terms in zip(*probes.terms, strict=True):
            left = derivatives.cotangents_at(use, [term.left for term in terms])
            right = derivatives.cotangents_at(use, [term.right.cotangents for term in terms])
            if left is not None and right is not None:
                yield torch.stack(left, 1), torch.stack(right, 1)

    def _add_products(self, r: Tensor, samples: slice, y: int) -> None:
        """Add r [b, K, P] of one vector, scaled where float32 does not hold the squares."""
        gram, scale = r @ r.transpose(1, 2), 1.0
        if r.dtype != torch.float64 and not in_float32_range(gram):
            power = power_of_two_scale(r)
            r, scale = r * (1 / power).to(r.dtype), power  # type: ignore[assignment]
            gram = r @ r.transpose(1, 2)
        gram, probes = gram.double() * scale**2, r.shape[1]
        squares = gram.diagonal(dim1=1, dim2=2)
        self.chunk["trace"][samples, y] = r.sum((1, 2)).double() * scale / probes
        self.chunk["probe_squares"][samples, y] = squares
        mixed = gram.sum((1, 2)) - squares.sum(1)
        self.chunk["square"][samples, y] = mixed / (probes * (probes - 1))
        if self.diagonal is not None and self.diagonal_square is not None and self._has_weight(y):
            w = self.weights[samples, y].double().unsqueeze(1)
            r = r.double()
            shape = self.parameter.shape
            self.diagonal += (w * r.mean(1)).sum(0).view(shape) * scale
            self.diagonal_square += (w * unbiased_square(r)).sum(0).view(shape) * scale**2

    def _has_weight(self, y: int) -> bool:
        return y < self.weights.shape[1]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.parameter.device)


def _add(total: Tensor | None, x: Tensor) -> Tensor:
    """The sum, where None is zero."""
    return x if total is None else total + x
