"""From directions and their Hessian-vector products to one parameter's second-derivative sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.curvature.double_backward import Curve
from fimprobe.engines.curvature.parameter_derivatives import ParameterDerivatives
from fimprobe.engines.layers.rules import embedding_tokens
from fimprobe.engines.moments.contraction import precise
from fimprobe.engines.moments.power_sums import power_of_two_scale
from fimprobe.engines.primitives.random_signs import signs
from fimprobe.engines.problem.weights import GRAM_LIMIT
from fimprobe.engines.tracing.tape import ParameterUse
from fimprobe.statistics import Curvature


@dataclass
class CurvatureAccumulator:
    """The running sums of one parameter; see :class:`fimprobe.statistics.Curvature`."""

    parameter: Tensor
    diagonals: bool
    room: float
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    diagonal: Tensor | None = None
    diagonal_square: Tensor | None = None

    def begin(self, size: int, count: int, second: Tensor, exact: bool, self_meeting: bool) -> None:
        """Start a chunk of ``size`` inputs and ``count`` seeds."""
        self.size, self.count, self.second, self.meets = size, count, second, self_meeting
        self.full = exact and second.shape[1] <= GRAM_LIMIT
        self.chunk: dict[str, Tensor] = {}
        if self.diagonals and self.diagonal is None:
            wide = torch.zeros_like(self.parameter, dtype=torch.float64)
            self.diagonal, self.diagonal_square = wide.clone(), wide.clone()

    def end(self) -> None:
        """Keep the chunk's results."""
        for key, value in self.chunk.items():
            self.parts.setdefault(key, []).append(value)

    def zeros(self, *shape: int) -> Tensor:
        """Float64 zeros on the parameter's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.parameter.device)

    def add_diagonal(
        self,
        pull: ParameterDerivatives,
        y: int,
        first: list[list[Tensor | None]],
        bent: list[Curve],
        delta: list[Tensor | None],
        seed: int,
    ) -> None:
        """One seed's diagonal of R from K probes at the layers' outputs."""
        probes = len(first)
        if "trace" not in self.chunk:
            self.add_zero_diagonal(probes)
        own = bool(pull.site.calls)
        use, tokens = pull.outer(), pull.tokens()
        if use is not None and not self.meets:
            self._outer_diagonal(pull, use, y, first, bent)
            return
        if tokens is not None:
            self._token_diagonal(pull, tokens, y, first, bent)
            return
        step = max(1, int(self.room / (4 * probes * self.parameter.numel() * 8)))
        for start in range(0, self.size, step):
            samples = slice(start, min(start + step, self.size))
            left = pull.first(first, samples)
            products = []
            for k in range(probes):
                r: Tensor | None = None
                if left is not None:
                    right = pull.second(bent[k], delta, samples, inputs=2.0 if self.meets else 0.0)
                    if right is not None:
                        r = left[:, k] * right[:, 0]
                if own:
                    r = self._fallback_diagonal(pull, delta, y, k, samples, seed, r)
                if r is not None:
                    products.append(r.reshape(len(r), -1))
            if products:
                self._products(torch.stack(products, 1), samples, y)

    def add_zero_diagonal(self, probes: int | None) -> None:
        """R's diagonal is zero, whatever the probes (None: exact)."""
        self.chunk["trace"] = self.zeros(self.size, self.count)
        self.chunk["square"] = self.zeros(self.size, self.count)
        if probes is not None:
            self.chunk["probe_squares"] = self.zeros(self.size, self.count, probes)

    def add_exact(self, y: int, diagonal: Tensor | None, samples: slice) -> None:
        """R's diagonal of one seed as it is: [b, *shape]."""
        if "trace" not in self.chunk:
            self.chunk["trace"] = self.zeros(self.size, self.count)
            self.chunk["square"] = self.zeros(self.size, self.count)
        if diagonal is None:
            return
        r = diagonal.double().reshape(len(diagonal), -1)
        self.chunk["trace"][samples, y] = r.sum(1)
        self.chunk["square"][samples, y] = r.square().sum(1)
        if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
            w = self.second[samples, y].double().unsqueeze(1)
            shape = self.parameter.shape
            self.diagonal += (w * r).sum(0).view(shape)
            self.diagonal_square += (w * r.square()).sum(0).view(shape)

    def _fallback_diagonal(self, pull, delta, y, k, samples, seed, r):
        """What a replayed module bends by itself: u∘(∂²(δᵀz)u)."""
        u = signs(
            (1, *self.parameter.shape),
            f"own {y} {k} {pull.name}",
            seed,
            dtype=self.parameter.dtype,
            device=self.parameter.device,
        )[0]
        pull.output_seed = self.seeds[y]
        pull.along, before = {pull.name: u}, pull.along
        still = Curve([None] * len(delta), [])
        for call, local in pull.site.calls:
            g = pull._fallback_tangents(call, local, still, delta, samples, within=True)
            if g is not None:
                g = u * g[:, 0]
                r = g if r is None else r + g
        pull.along = before
        return r

    def _outer_diagonal(
        self, pull: ParameterDerivatives, use: ParameterUse, y: int, first: Any, bent: Any
    ) -> None:
        x2 = precise(use.call.inputs[0]).square()
        length, x4 = x2.sum(-1).double(), x2.double().square().sum(-1)
        v, parts = pull.at(use, first), pull.at(use, [c.edges for c in bent])
        if v is None or parts is None:
            return
        d = (torch.stack(v, 1) * torch.stack(parts, 1)).double()
        squares = d.square().sum(-1)
        self.chunk["trace"][:, y] = d.mean(1).sum(-1) * length
        self.chunk["probe_squares"][:, y] = squares * x4.unsqueeze(1)
        self.chunk["square"][:, y] = _pairs(d).sum(-1) * x4
        if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
            w = self.second[:, y].double().unsqueeze(1)
            self.diagonal += (w * d.mean(1)).T @ x2.double()
            self.diagonal_square += (w * _pairs(d)).T @ x2.double().square()

    def _token_diagonal(
        self, pull: ParameterDerivatives, use: ParameterUse, y: int, first: Any, bent: Any
    ) -> None:
        v, parts = pull.at(use, first), pull.at(use, [c.edges for c in bent])
        if v is None or parts is None:
            return
        sample, token, left = embedding_tokens(use.call, torch.stack(v, 1))
        r = (left * embedding_tokens(use.call, torch.stack(parts, 1))[2]).double()
        self.chunk["trace"][:, y].index_add_(0, sample, r.mean(1).sum(-1))
        self.chunk["square"][:, y].index_add_(0, sample, _pairs(r).sum(-1))
        self.chunk["probe_squares"][:, y].index_add_(0, sample, r.square().sum(-1))
        if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
            w = self.second[:, y].double()[sample].unsqueeze(1)
            self.diagonal.index_add_(0, token, w * r.mean(1))
            self.diagonal_square.index_add_(0, token, w * _pairs(r))

    def _products(self, r: Tensor, samples: slice, y: int) -> None:
        """r [b, K, P] of one seed."""
        gram, scale = r @ r.transpose(1, 2), 1.0
        if r.dtype != torch.float64 and not _in_range(gram):
            own = power_of_two_scale(r)
            r, scale = r * (1 / own).to(r.dtype), own  # type: ignore[assignment]
            gram = r @ r.transpose(1, 2)
        gram, probes = gram.double() * scale**2, r.shape[1]
        squares = gram.diagonal(dim1=1, dim2=2)
        self.chunk["trace"][samples, y] = r.sum((1, 2)).double() * scale / probes
        self.chunk["probe_squares"][samples, y] = squares
        both = gram.sum((1, 2)) - squares.sum(1)
        self.chunk["square"][samples, y] = both / (probes * (probes - 1))
        if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
            w = self.second[samples, y].double().unsqueeze(1)
            wide = r.double()
            shape = self.parameter.shape
            self.diagonal += (w * wide.mean(1)).sum(0).view(shape) * scale
            self.diagonal_square += (w * _pairs(wide)).sum(0).view(shape) * scale**2

    def _weigh(self, y: int) -> bool:
        return y < self.second.shape[1]

    def add_block(self, pull: ParameterDerivatives, local: Any, deltas: Any, flips: Tensor) -> None:
        """⟨(R_y u)_θ, (R_z σu)_θ⟩ within the calls."""

        def plain(y: int, s: slice) -> Tensor | None:
            pull.output_seed = self.seeds[y]
            return pull.second(local[0][y], deltas[y], s, within=True)

        def flipped(y: int, s: slice) -> Tensor | None:
            pull.output_seed = self.seeds[y]
            return pull.second(local[1][y], deltas[y], s, within=True, flipped=True)

        sides = [[c.edges for c in half] for half in local]
        self._pairs_of("block", pull, plain, flipped, *sides)
        self._append("signs", flips.double())

    def add_whole(self, pull: ParameterDerivatives, whole: Any, turned: Any, deltas: Any) -> None:
        """The same for all parameters moving at once, plain and (for ``joint``) flipped."""

        def plain(y: int, s: slice) -> Tensor | None:
            pull.output_seed = self.seeds[y]
            return pull.second(whole[y], deltas[y], s, inputs=1.0, everything=True)

        use = pull.matrix()
        if use is not None:
            self._append("whole", self._matrix_whole(pull, use, whole, deltas))
        else:
            self._pairs_of("whole", pull, plain, None, None, None)
        if turned is not None:

            def flipped(y: int, s: slice) -> Tensor | None:
                pull.output_seed = self.seeds[y]
                return pull.second(turned[y], deltas[y], s, inputs=1.0, everything=True, flipped=True)

            self._pairs_of("joint", pull, plain, flipped, None, None)

    def _matrix_whole(
        self, pull: ParameterDerivatives, use: ParameterUse, whole: Any, deltas: Any
    ) -> Tensor:
        """Σ_t (a_t x_tᵀ + δ_t ẋ_tᵀ) of each seed: inner products from those of their sides."""
        bent, delta = pull.at(use, [c.edges for c in whole]), pull.at(use, deltas)
        like = bent or delta
        if like is None:
            return self._empty()
        x = _positions(precise(use.call.inputs[0]))
        left, right = [], []
        for y in range(self.count):
            moved = pull.input_direction(use, whole[y])
            sides = [_positions(like[y] * 0 if bent is None else bent[y])], [x]
            if delta is not None and moved is not None and moved[0] is not None:
                sides[0].append(_positions(delta[y]))
                sides[1].append(_positions(moved[0]))
            left.append(torch.cat(sides[0], 1))
            right.append(torch.cat(sides[1], 1))
        return self._matrix_gram(left, left, right, right)

    def _matrix_gram(
        self, a: list[Tensor], b: list[Tensor], x: list[Tensor], z: list[Tensor]
    ) -> Tensor:
        """⟨Σ_t a_t x_tᵀ, Σ_s b_s z_sᵀ⟩ = Σ_ts (a_t·b_s)(x_t·z_s) for each pair of seeds."""
        gram = self._empty()
        for i, (left, rows) in enumerate(zip(a, x, strict=True)):
            for j, (right, columns) in enumerate(zip(b, z, strict=True)):
                if self.full or i == j:
                    inner = _inner_products(left, right) * _inner_products(rows, columns)
                    gram[(slice(None), i, j) if self.full else (slice(None), i)] = inner.sum((1, 2))
        return (gram + gram.transpose(1, 2)) / 2 if self.full else gram

    def _empty(self) -> Tensor:
        return self.zeros(self.size, *([self.count] * (2 if self.full else 1)))

    def _append(self, key: str, value: Tensor) -> None:
        """Stack the directions: [J, b, ...]."""
        value = value.unsqueeze(0)
        old = self.chunk.get(key)
        self.chunk[key] = value if old is None else torch.cat([old, value])

    def _pairs_of(self, key, pull, plain, flipped, edges, turned) -> None:
        use = pull.matrix() if edges is not None else None
        tokens = pull.tokens()
        gram = self._empty()
        if use is not None:
            a, b = pull.at(use, edges), pull.at(use, turned)
            if a is not None and b is not None:
                x = [_positions(precise(use.call.inputs[0]))] * self.count
                left, right = ([_positions(v) for v in side] for side in (a, b))
                gram = self._matrix_gram(left, right, x, x)
        elif tokens is not None and edges is not None:
            a, b = pull.at(tokens, edges), pull.at(tokens, turned)
            if a is not None and b is not None:
                sample, _, rows = embedding_tokens(tokens.call, torch.stack(a, 1))
                other = embedding_tokens(tokens.call, torch.stack(b, 1))[2]
                gram.index_add_(0, sample, self._inner(rows.double(), other.double()))
        else:
            count = self.count if self.full else 1
            step = max(1, int(self.room / (2 * count * self.parameter.numel() * 8)))
            for start in range(0, self.size, step):
                samples = slice(start, min(start + step, self.size))
                if self.full:
                    a = self._stacked(plain, samples)
                    b = a if flipped is None else self._stacked(flipped, samples)
                    if a is not None and b is not None:
                        gram[samples] = self._inner(a, b)
                    continue
                for y in range(self.count):
                    a = plain(y, samples)
                    b = a if flipped is None else flipped(y, samples)
                    if a is not None and b is not None:
                        gram[samples, y] = _product(a.flatten(1), b.flatten(1))
        self._append(key, gram)

    def _stacked(self, make: Callable[[int, slice], Tensor | None], samples: slice) -> Tensor | None:
        parts = [make(y, samples) for y in range(self.count)]
        like = next((p for p in parts if p is not None), None)
        if like is None:
            return None
        filled = [torch.zeros_like(like) if p is None else p for p in parts]
        whole = torch.cat(filled, 1).double()
        return whole.reshape(*whole.shape[:2], -1)

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.full:
            return (a * b).sum(-1)
        gram = a @ b.transpose(1, 2)
        return (gram + gram.transpose(1, 2)) / 2

    seeds: list[Tensor] = field(default_factory=list)
    """The seeds at the outputs, for calls of the whole model."""

    def joined(self) -> dict[str, Tensor]:
        """The parts of all chunks, where they are."""
        return {k: torch.cat(v, 1 if k in _PER_DIRECTION else 0) for k, v in self.parts.items()}

    def finish(self, parts: dict[str, Tensor]) -> Curvature:
        """The results of all chunks; ``parts`` are :meth:`joined`, fetched."""
        return Curvature(
            parts["trace"],
            parts["square"],
            parts.get("probe_squares"),
            parts["block"],
            parts["whole"],
            parts["signs"],
            parts.get("joint"),
            self.diagonal,
            self.diagonal_square,
        )


_PER_DIRECTION = ("block", "whole", "signs", "joint")


def _positions(x: Tensor) -> Tensor:
    """[b, T, width]: whatever lies between the batch and the last dimension is a position."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """a_t·b_s [b, T, S] in float64's range, without float64 copies of the vectors."""
    gram = a @ b.transpose(1, 2)
    if a.dtype != torch.float64 and not _in_range(gram):
        one, two = power_of_two_scale(a), power_of_two_scale(b)
        gram = (a * (1 / one).to(a.dtype)) @ (b * (1 / two).to(b.dtype)).transpose(1, 2)
        return gram.double() * one * two
    return gram.double()


def _in_range(gram: Tensor) -> bool:
    """Whether float32 held these inner products; never asked of a GPU, which would be waited for."""
    if gram.device.type != "cpu" or gram.numel() == 0:
        return False
    low, high = torch.aminmax(gram)
    return 1e-20 < max(float(high), -float(low)) < 1e30


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b [b]."""
    return _inner_products(a.unsqueeze(1), b.unsqueeze(1))[:, 0, 0]


def _pairs(r: Tensor) -> Tensor:
    """The unbiased square of a mean over probes: r [b, K, P] -> [b, P]."""
    probes = r.shape[1]
    return (r.sum(1).square() - r.square().sum(1)) / (probes * (probes - 1))
