"""From per-sample gradients to moments, one parameter at a time and without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

GRAM_LIMIT = 16
"""Above so many draws or passes only the per-sample squared norms are kept of the Gram matrix."""


AT_ONCE = 2**24
"""Numbers that are copied to float64 together, to be summed."""


@dataclass(frozen=True)
class Weights:
    """Factors of g² and g⁴ [B, S] of exact passes, and each pass's block; None for sampled draws."""

    second: Tensor
    fourth: Tensor
    blocks: list[int]

    def rows(self, samples: slice | Tensor) -> Weights:
        """The weights of some samples."""
        return Weights(self.second[samples], self.fourth[samples], self.blocks)

    def parts(self) -> list[slice]:
        """The passes of each block."""
        found, start = [], 0
        for end in range(1, len(self.blocks) + 1):
            if end == len(self.blocks) or self.blocks[end] != self.blocks[start]:
                found.append(slice(start, end))
                start = end
        return found


@dataclass
class Accumulator:
    """The running moments of one parameter; see :class:`fimprobe.types.Moments`.

    ``add`` and its kin take gradients as they are, or divided by a ``scale``, a power of two that
    keeps their fourth powers inside float32's range. Without one they look whether the powers
    stayed there, and answer False, having taken nothing, where they did not; on a GPU, where
    looking means waiting, the caller gives the scale beforehand.
    """

    a2: Tensor
    """Uninitialised until the first contribution."""
    sums: Tensor
    """A4, Q, R and the top sum over all entries, float64 [4]."""
    diagonals: bool = False
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
        cls, parameter: Tensor, sums: Tensor, *, diagonals: bool, sharded: bool, bare: bool
    ) -> Accumulator:
        """An accumulator for gradients of a tensor like this one; ``sharded``: to be opened."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if sharded or bare:
            nothing = torch.zeros((), dtype=dtype, device=parameter.device)
            return cls(nothing.expand(parameter.shape), sums, bare=bare, empty=not bare)
        a2 = torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        made = cls(a2, sums, diagonals)
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
            own = power_of_two(g)
            if not is_one(own):
                g, scale = g * (1 / own).to(g.dtype), scale * own
        gram = torch.bmm(g, g.transpose(1, 2)) if self.gram.dim() == 3 else None
        square = g.square_() if fresh else g.square()
        powers = _power_sums(square, weights, scale)
        if powers is None:
            return False
        self._take(powers.sums, scale)
        if gram is None:
            gram = square.sum(-1)
        self.gram[samples] += gram if scale is None else gram.double() * scale**2
        if not self.bare:
            self.zero()
            self.a2[where] += _unscaled(powers.f.sum(0), scale).view(tile)
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            quartic, own, rest = powers.entries(square, weights)
            self.a4[where] += (quartic.sum((0, 1)) * power).view(tile)
            self.q[where] += (own.sum(0) * power).view(tile)
            self.r[where] += (rest.sum(0) * power).view(tile)
        return True

    def add_rows(self, rows: RowPowers, x: Tensor | None) -> bool:
        """Take δ xᵀ with x [b, i], or δ itself: the moments factor, no g is formed."""
        scale = rows.scale
        if x is None:
            x2 = x4 = None
            length = x4_sum = torch.ones(len(rows.f), dtype=torch.float64, device=rows.f.device)
        else:
            if scale is not None and x.dtype != torch.float64:
                own = power_of_two(x)
                x, scale = x * (1 / own).to(x.dtype), scale * own
            x2 = x.square()
            each = torch.linalg.vecdot(x2, x2)
            if not _held(each, scale):
                return False
            # the powers are float32's, the sums over samples are taken in float64
            length, x4_sum = x2.sum(-1).double(), each.double()
        self._take(rows.sums @ x4_sum, scale)
        inner = rows.inner if x is None else rows.inner * _beside(length, rows.inner)
        self.gram += inner if scale is None else inner * scale**2
        f = _unscaled(rows.f, scale)
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

    def add_tokens(
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
        powers = _power_sums(square, weights, scale)
        if powers is None:
            return False
        self._take(powers.sums, scale)
        inner = _inner(rows) if self.gram.dim() == 3 else square.sum(-1)
        inner = inner.double() if scale is None else inner.double() * scale**2
        self.gram.index_add_(0, sample, inner)
        if not self.bare:
            self.zero()
            self.a2.index_add_(0, token, _unscaled(powers.f.to(self.a2.dtype), scale))
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            quartic, own, rest = powers.entries(square, weights)
            self.a4.index_add_(0, token, quartic.sum(1) * power)
            self.q.index_add_(0, token, own * power)
            self.r.index_add_(0, token, rest * power)
        return True

    def take_whole(self, g: Tensor, weights: Weights | None) -> None:
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

    def take_entries(self, a4: Tensor, q: Tensor, r: Tensor) -> None:
        """Take A4, Q and R of every entry, ready-made."""
        for mine, its in zip((self.a4, self.q, self.r), (a4, q, r), strict=True):
            assert mine is not None
            mine += its.view(mine.shape)

    def add_sums(
        self,
        a2: Tensor,
        gram: Tensor,
        a4_sum: Tensor,
        q_sum: Tensor,
        top_sum: Tensor,
        a4: Tensor | None,
        q: Tensor | None,
    ) -> None:
        """Take sums over the whole chunk that were made elsewhere, of passes of a single block.

        ``a2`` may be the accumulator's own, filled.
        """
        self.gram += gram
        self._take(torch.stack([a4_sum, q_sum, q_sum, top_sum]), None)
        if a2 is not self.a2 and not self.bare:
            self.zero()
            self.a2 += a2
        self.empty = False
        if self.a4 is not None:
            assert a4 is not None and q is not None
            self.take_entries(a4, q, q)

    def result(self) -> Any:
        """A2: a DTensor where the parameter is sharded, empty where it is not wanted."""
        if self.bare:
            return self.sums.new_empty(0)
        return self.a2 if self.own is None else self.own

    def square_norm(self) -> Tensor:
        """Σ_i A2_i², in float64 where float32 would leave its range or the tensor is small."""
        if self.bare:
            return torch.zeros_like(self.sums[0])
        if self.own is None:
            self.zero()
        a2 = self.a2 if self.own is None else self.own.to_local()
        flat = a2.reshape(-1)
        if flat.device.type == "cpu" and flat.dtype == torch.float32 and flat.numel() > 4096:
            square = torch.dot(flat, flat)
            if 1e-25 < float(square) < 1e30:
                return square.double()
        squares = [_dot(wide, wide) for wide in map(Tensor.double, flat.split(AT_ONCE))]
        return squares[0] if len(squares) == 1 else torch.stack(squares).sum()

    def zero(self) -> None:
        """Start from zero where nothing was taken yet."""
        if self.empty:
            self.a2.zero_()
            self.empty = False

    def _take(self, sums: Tensor, scale: Tensor | None) -> None:
        self.sums += sums if scale is None else sums * scale**4


@dataclass
class RowPowers:
    """Powers of δ [b, S, o] (over ``scale``) that moments of δ xᵀ factor into, and of δ itself."""

    square: Tensor
    weights: Weights | None
    scale: Tensor | None
    f: Tensor
    """Σ_s w δ² [b, o]."""
    blocks: list[Tensor]
    sums: Tensor
    """Of each sample, over o: A4, Q, R and top, float64 [4, b]."""
    inner: Tensor
    """Inner products of the draws, float64 [b, S, S], or squared norms [b, S]."""

    @classmethod
    def of(cls, delta: Tensor, weights: Weights | None, *, rescale: bool) -> RowPowers | None:
        """None where float32 did not hold δ⁴ as it is; with ``rescale`` it does."""
        scale: Tensor | None = None
        if rescale:
            scale = torch.ones((), dtype=torch.float64, device=delta.device)
            if delta.dtype != torch.float64:
                scale = power_of_two(delta)
                delta = delta * (1 / scale).to(delta.dtype)
        square = delta.square()
        each = torch.linalg.vecdot(square, square)
        if not _held(each, scale):
            return None
        blocks = _block_sums(square, weights)
        f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        fourth = each.sum(1).double() if weights is None else (each.double() * weights.fourth).sum(1)
        q = r = fourth
        if weights is not None or delta.shape[1] > 1:
            q = r = torch.linalg.vecdot(f, f).double()
        if len(blocks) > 1:
            r = torch.stack([torch.linalg.vecdot(t, t) for t in blocks]).sum(0).double()
        top = torch.zeros_like(fourth)
        if len(blocks) == 1 and weights is not None:
            top = torch.linalg.vecdot(f, square.amax(1)).double()
        inner = _inner(delta) if 1 < delta.shape[1] <= GRAM_LIMIT else square.sum(-1)
        sums = torch.stack([fourth, q, r, top])
        return cls(square, weights, scale, f, blocks, sums, inner.double())

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """A4, Q and R of each entry of δ [b, o], in float64."""
        quartic, own, rest = _Powers(self.f, self.blocks, self.sums).entries(
            self.square, self.weights
        )
        return quartic.sum(1), own, rest


def _beside(factors: Tensor, x: Tensor) -> Tensor:
    """[b] in a shape that multiplies the samples of ``x``."""
    return factors.view(-1, *[1] * (x.dim() - 1))


class _Powers(NamedTuple):
    """Of g² [b, S, P]: F_b = Σ_s w g² [b, P], the same for each block, and A4, Q, R, top [4]."""

    f: Tensor
    blocks: list[Tensor]
    sums: Tensor

    def entries(self, square: Tensor, weights: Weights | None) -> tuple[Tensor, Tensor, Tensor]:
        """A4 [b, S, P], Q and R [b, P] of every entry, in float64."""
        quartic = square.double().square()
        if weights is not None:
            quartic *= weights.fourth.double().unsqueeze(-1)
        own = self.f.double().square()
        if len(self.blocks) == 1:
            return quartic, own, own
        rest = torch.zeros_like(own)
        for block in self.blocks:
            rest += block.double().square()
        return quartic, own, rest


def _power_sums(square: Tensor, weights: Weights | None, scale: Tensor | None) -> _Powers | None:
    """Sums of g² and g⁴ over all entries; None where float32 did not hold g⁴."""
    blocks = _block_sums(square, weights)
    if weights is None:
        fourth = _dot(square, square)
        if not _held(fourth, scale, square.dtype):
            return None
    else:
        each = torch.linalg.vecdot(square, square)
        if not _held(each, scale):
            return None
        fourth = (each.double() * weights.fourth).sum()
    f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
    q = r = fourth
    if weights is not None or square.shape[1] > 1:
        q = r = _dot(f, f)
    if len(blocks) > 1:
        r = torch.stack([_dot(t, t) for t in blocks]).sum()
    top = torch.zeros_like(fourth)
    if len(blocks) == 1 and weights is not None:
        top = _dot(f, square.amax(1))
    return _Powers(f, blocks, torch.stack([fourth, q, r, top]))


def _held(powers: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None) -> bool:
    """Whether float32 held the fourth powers; of scaled ones it is known, and not asked.

    What is flushed to zero, below 1e-38, is then less than a billionth of their sum.
    """
    if scale is not None or (dtype or powers.dtype) == torch.float64:
        return True
    return 1e-20 < float(powers.sum()) < 1e30


def _unscaled(square: Tensor, scale: Tensor | None) -> Tensor:
    """Squares of what was divided by ``scale``."""
    return square if scale is None or is_one(scale) else square * scale.to(square.dtype) ** 2


def power_of_two(*tensors: Tensor) -> Tensor:
    """The power of two next above the product of the tensors' largest magnitudes; 1 for zero.

    Dividing by it is exact and keeps fourth powers inside float32's range. 1 as well where the
    product is moderate and looking at it costs no synchronisation.
    """
    product = torch.ones((), dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        low, high = torch.aminmax(x)
        product = product * torch.maximum(-low, high).double()
    if product.device.type == "cpu" and (float(product) == 0 or 1e-3 < float(product) < 1e3):
        return torch.ones_like(product)
    product = torch.where((product > 0) & torch.isfinite(product), product, 1.0)
    return torch.exp2(torch.ceil(torch.log2(product)))


def is_one(scale: Tensor) -> bool:
    """Whether a scale does nothing; never asked of a GPU, which would have to be waited for."""
    return scale.device.type == "cpu" and float(scale) == 1


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1)).double()


def _inner(rows: Tensor) -> Tensor:
    """The inner products [b, S, S] of each sample's S rows [b, S, P], S being small."""
    draws = rows.shape[1]
    if draws > 3:
        return torch.bmm(rows, rows.transpose(1, 2))
    found = rows.new_empty(len(rows), draws, draws)
    for s in range(draws):
        for t in range(s, draws):
            found[:, s, t] = found[:, t, s] = torch.linalg.vecdot(rows[:, s], rows[:, t])
    return found


def _block_sums(square: Tensor, weights: Weights | None) -> list[Tensor]:
    """Σ over each block's passes of weight·g² [b, P]."""
    if weights is None:
        return [square.squeeze(1) if square.shape[1] == 1 else square.sum(1)]
    second = weights.second.to(square.dtype).unsqueeze(1)
    return [torch.bmm(second[..., p], square[:, p]).squeeze(1) for p in weights.parts()]
