"""From per-sample gradients to moments, one parameter at a time and without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.moments.power_sums import (
    OuterProductPowers,
    beside,
    dot,
    held,
    inner_products,
    is_one,
    power_of_two_scale,
    power_sums,
    undo_scale,
)
from fimprobe.engines.problem.weights import Weights

MAX_FLOAT64_ELEMENTS = 2**24
"""Numbers that are copied to float64 together, to be summed."""


@dataclass
class MomentAccumulator:
    """The running moments of one parameter; see :class:`fimprobe.statistics.Moments`.

    ``add`` and its kin take gradients as they are, or divided by a ``scale``, a power of two that
    keeps their fourth powers inside float32's range. Without one they look whether the powers
    stayed there, and answer False, having taken nothing, where they did not; on a GPU, where
    looking means waiting, the caller gives the scale beforehand.
    """

    a2: Tensor
    """Uninitialised until the first contribution."""
    diagonals: bool = False
    sums: Any = None
    """Of the chunk at hand: A4, Q, R and top of each sample, over all entries, float64 [4, b]."""
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    gram: Any = None
    """Of the chunk at hand: [b, S, S], or squared norms [b, S]."""
    empty: bool = True
    bare: bool = False
    """Whether A2 is not wanted; ``a2`` then has its shape and no memory."""
    own: Any = None
    """This process's rows of ``a2`` where the parameter is sharded (a DTensor)."""

    @classmethod
    def like(
        cls, parameter: Tensor, *, diagonals: bool, sharded: bool, bare: bool
    ) -> MomentAccumulator:
        """An accumulator for gradients of a tensor like this one; ``sharded``: to be opened."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if sharded or bare:
            nothing = torch.zeros((), dtype=dtype, device=parameter.device)
            return cls(nothing.expand(parameter.shape), bare=bare, empty=not bare)
        a2 = torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        made = cls(a2, diagonals)
        if diagonals:
            # fourth powers of small gradients leave float32's range
            made.a4, made.q, made.r = (torch.zeros_like(a2, dtype=torch.float64) for _ in range(3))
        return made

    @contextmanager
    def opened(self, scatter: Callable[[Tensor], Any] | None) -> Iterator[None]:
        """Take contributions; ``scatter`` then keeps a part of their sum (None keeps it all)."""
        if scatter is None:
            yield
            return
        closed = self.a2
        self.a2, self.empty = (
            torch.empty(closed.shape, dtype=closed.dtype, device=closed.device),
            True,
        )
        yield
        self.zero()
        rows = scatter(self.a2)
        self.own = rows if self.own is None else self.own + rows
        self.a2, self.empty = closed, False

    def add(
        self,
        g: Tensor,
        samples: slice,
        where: Any,
        weights: Weights | None,
        scale: Tensor | None = None,
        *,
        fresh: bool = False,
    ) -> bool:
        """Take g [b, S, *tile] of some samples and leading rows of the parameter.

        ``fresh``: g's memory is nobody else's and may be overwritten. Otherwise g may share memory
        with δ, and δ with other layers' δ: it is only read.
        """
        b, draws = g.shape[:2]
        tile = g.shape[2:]
        g = g.reshape(b, draws, -1)
        if scale is not None and g.dtype != torch.float64:  # whatever the inputs did to it
            own = power_of_two_scale(g)
            if not is_one(own):
                g, scale = g * (1 / own).to(g.dtype), scale * own
        gram = torch.bmm(g, g.transpose(1, 2)) if self.gram.dim() == 3 else None
        square = g.square_() if fresh else g.square()
        powers = power_sums(square, weights, scale)
        if powers is None:
            return False
        self._take(powers.sums, scale, samples)
        if gram is None:
            gram = square.sum(-1)
        self.gram[samples] += gram if scale is None else gram.double() * scale**2
        if not self.bare:
            self.zero()
            self.a2[where] += undo_scale(powers.f.sum(0), scale).view(tile)
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            quartic, own, rest = powers.entries(square, weights)
            self.a4[where] += (quartic.sum((0, 1)) * power).view(tile)
            self.q[where] += (own.sum(0) * power).view(tile)
            self.r[where] += (rest.sum(0) * power).view(tile)
        return True

    def add_outer_products(self, rows: OuterProductPowers, x: Tensor | None) -> bool:
        """Take δ xᵀ with x [b, i], or δ itself: the moments factor, no g is formed."""
        scale = rows.scale
        if x is None:
            x2 = x4 = None
            length = x4_sum = rows.sums.new_empty(0)
        else:
            if scale is not None and x.dtype != torch.float64:
                own = power_of_two_scale(x)
                x, scale = x * (1 / own).to(x.dtype), scale * own
            x2 = x.square()
            each = torch.linalg.vecdot(x2, x2)
            if not held(each, scale):
                return False
            # the powers are float32's, the sums over samples are taken in float64
            length, x4_sum = x2.sum(-1).double(), each.double()
        self._take(rows.sums if x is None else rows.sums * x4_sum, scale)
        inner = rows.inner if x is None else rows.inner * beside(length, rows.inner)
        self.gram += inner if scale is None else inner * scale**2
        f = undo_scale(rows.f, scale)
        if self.bare:
            pass
        elif x2 is None:
            self.take(f.sum(0)) if self.empty else self.a2.add_(f.sum(0))
        elif self.empty and f.dtype == self.a2.dtype:
            torch.mm(f.t(), x2, out=self.a2)
            self.empty = False
        else:
            self.zero()
            self.a2.addmm_(f.t().to(self.a2.dtype), x2.to(self.a2.dtype))
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            x4 = None if x2 is None else x2.double().square()
            for mine, its in zip((self.a4, self.q, self.r), rows.entries, strict=True):
                mine += (its.sum(0) if x4 is None else its.t() @ x4) * power
        return True

    def add_lookup_rows(
        self,
        sample: Tensor,
        token: Tensor,
        rows: Tensor,
        weights: Weights | None,
        scale: Tensor | None = None,
    ) -> bool:
        """Take g given by its non-zero rows [U, S, D] of (sample, token) pairs."""
        square = rows.square()
        weights = None if weights is None else weights.rows(sample)
        powers = power_sums(square, weights, scale)
        if powers is None:
            return False
        sums = powers.sums if scale is None else powers.sums * scale**4
        self.sums.index_add_(1, sample, sums)
        inner = inner_products(rows) if self.gram.dim() == 3 else square.sum(-1)
        inner = inner.double() if scale is None else inner.double() * scale**2
        self.gram.index_add_(0, sample, inner)
        if not self.bare:
            self.zero()
            self.a2.index_add_(0, token, undo_scale(powers.f.to(self.a2.dtype), scale))
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            quartic, own, rest = powers.entries(square, weights)
            self.a4.index_add_(0, token, quartic.sum(1) * power)
            self.q.index_add_(0, token, own * power)
            self.r.index_add_(0, token, rest * power)
        return True

    def add_all_samples(self, g: Tensor, weights: Weights | None) -> None:
        """Take g [b, S, *parameter] of all samples of the chunk, rescaled where it must be."""
        samples = slice(0, len(g))
        where: Any = slice(None) if g.dim() > 2 else ...
        one = torch.ones((), dtype=torch.float64, device=g.device)
        if g.device.type != "cpu" or not self.add(g, samples, where, weights):
            self.add(g, samples, where, weights, one)

    def take(self, a2: Tensor) -> None:
        """Take Σ_b Σ_s w g² of every entry, ready-made."""
        if self.bare:
            return
        a2 = a2.to(self.a2.dtype).view(self.a2.shape)
        self.a2, self.empty = (a2, False) if self.empty else (self.a2 + a2, False)

    def add_entry_sums(self, a4: Tensor, q: Tensor, r: Tensor) -> None:
        """Take A4, Q and R of every entry, ready-made."""
        for mine, its in zip((self.a4, self.q, self.r), (a4, q, r), strict=True):
            assert mine is not None
            mine += its.view(mine.shape)

    def add_sums(
        self,
        a2: Tensor,
        gram: Tensor,
        sums: Tensor,
        entries: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        """Take what was made elsewhere of the whole chunk.

        Args:
            a2: Σ_b Σ_s w g² of every entry; may be the accumulator's own, filled.
            gram: inner products [b, S, S], or squared norms [b, S].
            sums: A4, Q, R and top of each sample [4, b].
            entries: A4, Q and R of every entry, where diagonals are wanted.
        """
        self.gram += gram
        self._take(sums, None)
        if a2 is not self.a2 and not self.bare:
            self.zero()
            self.a2 += a2
        self.empty = False
        if self.a4 is not None:
            assert entries is not None
            self.add_entry_sums(*entries)

    def result(self) -> Any:
        """A2: a DTensor where the parameter is sharded, empty where it is not wanted."""
        if self.bare:
            return self.a2.new_empty(0)
        return self.a2 if self.own is None else self.own

    def square_norm(self) -> Tensor:
        """Σ_i A2_i², in float64 where float32 would leave its range or the tensor is small."""
        if self.bare:
            return torch.zeros((), dtype=torch.float64, device=self.a2.device)
        if self.own is None:
            self.zero()
        a2 = self.a2 if self.own is None else self.own.to_local()
        flat = a2.reshape(-1)
        if flat.device.type == "cpu" and flat.dtype == torch.float32 and flat.numel() > 4096:
            square = torch.dot(flat, flat)
            if 1e-25 < float(square) < 1e30:
                return square.double()
        squares = [dot(wide, wide) for wide in map(Tensor.double, flat.split(MAX_FLOAT64_ELEMENTS))]
        return squares[0] if len(squares) == 1 else torch.stack(squares).sum()

    def zero(self) -> None:
        """Start from zero where nothing was taken yet."""
        if self.empty:
            self.a2.zero_()
            self.empty = False

    def _take(self, sums: Tensor, scale: Tensor | None, samples: slice | None = None) -> None:
        mine = self.sums if samples is None else self.sums[:, samples]
        mine += sums if scale is None else sums * scale**4
