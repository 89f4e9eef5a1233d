"""From per-sample gradients to moments, one parameter at a time and without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.types import Moments

GRAM_LIMIT = 16
"""Above so many draws or passes only the per-sample squared norms are kept of the Gram matrix."""


@dataclass(frozen=True)
class Weights:
    """Factors of g² and g⁴ [B, S] of exact passes, and each pass's block; None for sampled draws."""

    second: Tensor
    fourth: Tensor
    blocks: list[int]

    def rows(self, samples: slice) -> Weights:
        """The weights of some samples."""
        return Weights(self.second[samples], self.fourth[samples], self.blocks)


@dataclass
class Accumulator:
    """The running moments of one parameter."""

    a2: Tensor
    """Uninitialised until the first contribution."""
    diagonals: bool
    a4_sum: Tensor = field(init=False)
    q_sum: Tensor = field(init=False)
    r_sum: Tensor = field(init=False)
    top_sum: Tensor = field(init=False)
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    grams: list[Tensor] = field(default_factory=list)
    empty: bool = True
    own: Any = None
    """This process's rows of ``a2`` where the parameter is sharded (a DTensor)."""

    def __post_init__(self) -> None:
        """Start from zero."""
        zeros = torch.zeros(4, dtype=torch.float64, device=self.a2.device)
        self.a4_sum, self.q_sum, self.r_sum, self.top_sum = zeros.unbind()
        if self.diagonals:
            # fourth powers of small gradients leave float32's range
            wide = torch.zeros_like(self.a2, dtype=torch.float64)
            self.a4, self.q, self.r = wide.clone(), wide.clone(), wide.clone()

    @classmethod
    def like(cls, parameter: Tensor, diagonals: bool, sharded: bool = False) -> Accumulator:
        """An accumulator for gradients of a tensor like this one; ``sharded``: to be opened."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if sharded:
            nothing = torch.zeros((), dtype=dtype, device=parameter.device)
            return cls(nothing.expand(parameter.shape), diagonals)
        a2 = torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        return cls(a2, diagonals)

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
        self._zero()
        rows = scatter(self.a2)
        self.own = rows if self.own is None else self.own + rows
        self.a2, self.empty = closed, False

    def begin(self, samples: int, draws: int) -> None:
        """Make room for the Gram matrices [samples, S, S] (or squared norms) of the next chunk."""
        shape = (samples, draws, draws) if 1 < draws <= GRAM_LIMIT else (samples, draws)
        self.grams.append(torch.zeros(shape, dtype=torch.float64, device=self.a2.device))

    def add(
        self, g: Tensor, samples: slice, where: slice, scale: Tensor, weights: Weights | None
    ) -> None:
        """Take ``scale``·g [b, S, *tile] of some samples and leading rows of the parameter.

        ``g`` may share memory with δ, and δ with other layers' δ: it is only read.
        """
        b, draws = g.shape[:2]
        tile = g.shape[2:]
        g = g.reshape(b, draws, -1)
        if g.dtype != torch.float64:  # whatever the layer's inputs did to it
            own = power_of_two(g)
            if not _is_one(own):
                g, scale = g * (1 / own).to(g.dtype), scale * own
        gram = self.grams[-1][samples]
        if gram.dim() == 3:
            gram += torch.bmm(g, g.transpose(1, 2)).double() * scale**2
        square = g.square()
        if gram.dim() == 2:
            gram += square.sum(-1).double() * scale**2
        if weights is None:
            f = square.squeeze(1) if draws == 1 else square.sum(1)
            fourth = _dot(square, square)
            blocks: list[Tensor] = [f]
        else:
            blocks = _block_sums(square, weights)
            f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
            norms = square.square().sum(-1).double()
            fourth = (norms * weights.fourth.double()).sum()
        power = scale**4
        self.a4_sum += fourth * power
        q = fourth if weights is None and draws == 1 else _dot(f, f)
        self.q_sum += q * power
        single = len(blocks) == 1
        self.r_sum += (q if single else sum(_dot(t, t) for t in blocks)) * power
        if single and weights is not None:
            self.top_sum += _dot(f, square.amax(1)) * power
        self._zero()
        total = f.sum(0)
        self.a2[where] += (total if _is_one(scale) else total * scale.to(f.dtype) ** 2).view(tile)
        if self.a4 is not None and self.q is not None and self.r is not None:
            quartic = square.double().square()
            if weights is not None:
                quartic *= weights.fourth.double().unsqueeze(-1)
            self.a4[where] += (quartic.sum((0, 1)) * power).view(tile)
            own = f.double().square().sum(0)
            self.q[where] += (own * power).view(tile)
            r = own if single else sum(t.double().square().sum(0) for t in blocks)
            self.r[where] += (r * power).view(tile)

    def add_outer(self, delta: Tensor, x: Tensor, scale: Tensor, weights: Weights | None) -> None:
        """Take ``scale``·δ xᵀ with δ [b, S, o], x [b, i]: the moments factor, no g is formed."""
        power = scale**4
        gram = self.grams[-1]
        x2 = x.square()
        length, x4_sum = x2.sum(-1).double(), torch.linalg.vecdot(x2, x2).double()
        square = delta.square()
        if gram.dim() == 3:
            inner = torch.bmm(delta, delta.transpose(1, 2)).double()
            gram += inner * length[:, None, None] * scale**2
        else:
            gram += square.sum(-1).double() * length[:, None] * scale**2
        # δ was rescaled: its powers stay in range, the sums over samples are taken in float64
        single = weights is None and delta.shape[1] == 1
        if weights is None:
            blocks = [square.squeeze(1) if single else square.sum(1)]
        else:
            blocks = _block_sums(square, weights)
        f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        f2 = f.square()
        r2 = f2 if len(blocks) == 1 else torch.stack(blocks).square().sum(0)
        quartic = f2
        if weights is not None:
            quartic = torch.einsum("bs,bso->bo", weights.fourth.to(square.dtype), square.square())
        elif not single:
            quartic = square.square().sum(1)
        fourth = torch.dot(quartic.sum(-1).double(), x4_sum) * power
        q = fourth if single else torch.dot(f2.sum(-1).double(), x4_sum) * power
        self.a4_sum += fourth
        self.q_sum += q
        self.r_sum += q if r2 is f2 else torch.dot(r2.sum(-1).double(), x4_sum) * power
        if r2 is f2 and weights is not None:
            self.top_sum += torch.dot((f * square.amax(1)).sum(-1).double(), x4_sum) * power
        if not _is_one(scale):
            f = f * scale.to(f.dtype) ** 2
        if self.empty and f.dtype == self.a2.dtype:
            torch.mm(f.t(), x2, out=self.a2)
            self.empty = False
        else:
            self._zero()
            self.a2.addmm_(f.t().to(self.a2.dtype), x2.to(self.a2.dtype))
        if self.a4 is not None and self.q is not None and self.r is not None:
            x4 = x2.square()
            self.a4 += quartic.t().double() @ x4.double() * power
            self.q += f2.t().double() @ x4.double() * power
            self.r += r2.t().double() @ x4.double() * power

    def add_tokens(
        self,
        sample: Tensor,
        token: Tensor,
        rows: Tensor,
        scale: Tensor,
        weights: Weights | None,
    ) -> None:
        """Take ``scale``·g given by its non-zero rows [U, S, D] of (sample, token) pairs."""
        draws = rows.shape[1]
        if weights is None:
            weights_of = None
            square = rows.square()
            blocks = [square.sum(1)]
        else:
            weights_of = Weights(weights.second[sample], weights.fourth[sample], weights.blocks)
            square = rows.square()
            blocks = _block_sums(square, weights_of)
        gram = self.grams[-1]
        if gram.dim() == 3:
            inner = torch.bmm(rows, rows.transpose(1, 2)).double() * scale**2
        else:
            inner = square.sum(-1).double() * scale**2
        gram.index_add_(0, sample, inner.view(-1, *gram.shape[1:]))
        f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        quartic = square.double().square()
        if weights_of is not None:
            quartic = quartic * weights_of.fourth.double().unsqueeze(-1)
        power = scale**4
        self.a4_sum += quartic.sum() * power
        f2 = f.double().square()
        self.q_sum += f2.sum() * power
        r2 = f2 if len(blocks) == 1 else torch.stack(blocks).double().square().sum(0)
        self.r_sum += r2.sum() * power
        if len(blocks) == 1 and weights is not None:
            self.top_sum += _dot(f, square.amax(1)) * power
        self._zero()
        self.a2.index_add_(0, token, f.to(self.a2.dtype) * scale.to(self.a2.dtype) ** 2)
        if self.a4 is not None and self.q is not None and self.r is not None:
            quartic = quartic.sum(1) if draws > 1 else quartic.squeeze(1)
            self.a4.index_add_(0, token, quartic * power)
            self.q.index_add_(0, token, f2 * power)
            self.r.index_add_(0, token, r2 * power)

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
        self.grams[-1] += gram
        self.a4_sum += a4_sum
        self.q_sum += q_sum
        self.r_sum += q_sum
        self.top_sum += top_sum
        if a2 is not self.a2:
            self._zero()
            self.a2 += a2
        self.empty = False
        if self.a4 is not None and self.q is not None and self.r is not None:
            assert a4 is not None and q is not None
            self.a4 += a4
            self.q += q
            self.r += q

    def _zero(self) -> None:
        if self.empty:
            self.a2.zero_()
            self.empty = False

    def totals(self) -> tuple[Tensor, Tensor]:
        """Where the sums are: Σ A2, Σ A2², A4, Q, R and top, float64 [6], and the Gram matrices."""
        if self.own is None:
            self._zero()
        sums = _sums(self.a2 if self.own is None else self.own.to_local())
        rest = torch.stack([self.a4_sum, self.q_sum, self.r_sum, self.top_sum])
        return torch.cat([sums, rest]), torch.cat(self.grams)

    def finish(self, sums: Tensor, gram: Tensor) -> Moments:
        """The moments; ``sums`` and ``gram`` are :meth:`totals`, fetched."""
        total, square, a4_sum, q_sum, r_sum, top_sum = sums.tolist()
        return Moments(
            self.a2 if self.own is None else self.own,
            total,
            square,
            a4_sum,
            q_sum,
            r_sum,
            gram.diagonal(dim1=1, dim2=2) if gram.dim() == 3 else gram,
            top_sum,
            gram if gram.dim() == 3 else None,
            self.a4,
            self.q,
            self.r,
        )


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


def _is_one(scale: Tensor) -> bool:
    """Whether a scale does nothing; never asked of a GPU, which would have to be waited for."""
    return scale.device.type == "cpu" and float(scale) == 1


AT_ONCE = 2**24
"""Numbers that are copied to float64 together, to be summed."""


def _sums(x: Tensor) -> Tensor:
    """Σ x and Σ x², float64 [2]."""
    flat = x.reshape(-1)
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 4096:
        square = torch.dot(flat, flat)
        if 1e-25 < float(square) < 1e30:
            return torch.stack([flat.sum(), square]).double()
    found = torch.zeros(2, dtype=torch.float64, device=x.device)
    for part in flat.split(AT_ONCE):
        wide = part.double()
        found += torch.stack([wide.sum(), torch.dot(wide, wide)])
    return found


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1)).double()


def _block_sums(square: Tensor, weights: Weights) -> list[Tensor]:
    """Σ over each block's passes of weight·g² [b, P]."""
    second = weights.second.to(square.dtype)
    sums = []
    start = 0
    for end in range(1, len(weights.blocks) + 1):
        if end == len(weights.blocks) or weights.blocks[end] != weights.blocks[start]:
            part = slice(start, end)
            sums.append(torch.einsum("bs,bsp->bp", second[:, part], square[:, part]))
            start = end
    return sums
