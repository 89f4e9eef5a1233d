"""Running moments of one parameter, from per-sample gradients that are not kept.

Symbols: b samples of a chunk, S draws (or exact passes), g the per-sample gradients [b, S, ...], w
their weights of g². A4, Q, R and top are defined at :class:`fimprobe.statistics.Moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.moments.power_sums import (
    OuterProductPowers,
    broadcast_samples,
    inner_products,
    power_sums,
    sums_of_squares,
)
from fimprobe.engines.moments.scaling import (
    in_float32_range,
    is_one,
    power_of_two_scale,
    undo_scale,
)
from fimprobe.engines.problem.weights import PassWeights


@dataclass(kw_only=True)
class MomentAccumulator:
    """Running moments of one parameter; see :class:`fimprobe.statistics.Moments`.

    The ``add`` methods accept gradients as they are, or divided by ``scale``, a power of two that
    keeps their fourth powers inside the range of float32. Without a scale they check whether the
    powers stayed in that range. If not, they return False and leave the accumulator unchanged. On a
    GPU the check would wait for the device, so the caller passes a scale.
    """

    a2: Tensor
    """Σ w g² of every entry; uninitialised memory while ``empty``."""
    diagonals: bool = False
    """Whether A4, Q and R are kept for every entry."""
    sums: Any = None
    """A4, Q, R and top of each sample of the current chunk, over all entries: float64 [4, b]."""
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    gram: Any = None
    """Inner products of the current chunk [b, S, S], or squared norms [b, S], float64."""
    empty: bool = True
    """Whether nothing was added to ``a2`` yet."""
    sums_only: bool = False
    """Whether A2 is not kept; ``a2`` then has its shape and no memory."""
    local_shard: Any = None
    """This process's rows of ``a2`` if the parameter is sharded (a DTensor)."""

    @classmethod
    def like(
        cls, parameter: Tensor, *, diagonals: bool, sharded: bool, sums_only: bool
    ) -> MomentAccumulator:
        """An empty accumulator for gradients of one parameter.

        Args:
            parameter: A tensor of the parameter's shape, type and device.
            diagonals: Whether A4, Q and R are kept for every entry.
            sharded: Whether A2 is only allocated inside :meth:`sharded_sums`.
            sums_only: Whether A2 is not kept at all.
        """
        dtype = parameter.dtype
        if dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        if sharded or sums_only:
            # one element, expanded: the shape is needed, the memory is not
            zero = torch.zeros((), dtype=dtype, device=parameter.device)
            a2 = zero.expand(parameter.shape)
            return cls(a2=a2, sums_only=sums_only, empty=not sums_only)
        a2 = torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        accumulator = cls(a2=a2, diagonals=diagonals)
        if diagonals:
            # fourth powers of small gradients leave float32's range
            a4, q, r = (torch.zeros_like(a2, dtype=torch.float64) for _ in range(3))
            accumulator.a4, accumulator.q, accumulator.r = a4, q, r
        return accumulator

    @contextmanager
    def sharded_sums(self, scatter: Callable[[Tensor], Any] | None) -> Iterator[None]:
        """Keep only this process's rows of what is added to A2 inside the context.

        Args:
            scatter: Maps this process's A2 to its rows of the sum over processes; None for a
                parameter that is not sharded, whose A2 is kept whole.
        """
        if scatter is None:
            yield
            return
        without_memory = self.a2
        shape, dtype, device = without_memory.shape, without_memory.dtype, without_memory.device
        self.a2, self.empty = torch.empty(shape, dtype=dtype, device=device), True
        yield
        self._zero_if_empty()
        shard = scatter(self.a2)
        self.local_shard = shard if self.local_shard is None else self.local_shard + shard
        self.a2, self.empty = without_memory, False

    def add(
        self,
        g: Tensor,
        samples: slice,
        where: Any,
        weights: PassWeights | None,
        scale: Tensor | None = None,
        *,
        overwrite: bool = False,
    ) -> bool:
        """Add per-sample gradients of some samples and some leading rows of the parameter.

        Args:
            g: Gradients [b, S, *tile], divided by ``scale``.
            samples: Their place in the chunk.
            where: Index of the tile in the parameter.
            weights: Weights of these samples' passes.
            scale: See the class.
            overwrite: Whether the memory of ``g`` belongs to this call. Otherwise it may be that of
                δ, which other layers share, and it is only read.

        Returns:
            Whether they were added.
        """
        b, draws = g.shape[:2]
        tile = g.shape[2:]
        g = g.reshape(b, draws, -1)
        if scale is not None and g.dtype != torch.float64:
            # the caller's scale bounds δ; the layer's inputs may still make g large
            more = power_of_two_scale(g)
            if not is_one(more):
                g, scale = g * (1 / more).to(g.dtype), scale * more
        gram = torch.bmm(g, g.transpose(1, 2)) if self.gram.dim() == 3 else None
        square = g.square_() if overwrite else g.square()
        powers = power_sums(square, weights, scale)
        if powers is None:
            return False
        self._add_powers(powers.sums, scale, samples)
        if gram is None:
            gram = square.sum(-1)
        # x[i] += y would copy the sum onto itself
        self.gram[samples].add_(gram if scale is None else gram.double() * scale**2)
        if not self.sums_only:
            f = undo_scale(powers.f.sum(0), scale)
            if self.empty and f.shape[0] == self.a2.numel() and f.dtype == self.a2.dtype:
                self.add_squares(f)
            else:
                self._zero_if_empty()
                self.a2[where].add_(f.view(tile))
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            quartic, q, r = powers.entries(square, weights)
            self.a4[where] += (quartic.sum((0, 1)) * power).view(tile)
            self.q[where] += (q.sum(0) * power).view(tile)
            self.r[where] += (r.sum(0) * power).view(tile)
        return True

    def add_outer_products(self, rows: OuterProductPowers, x: Tensor | None) -> bool:
        """Add the gradients δ xᵀ, or δ itself, whose moments factor: no gradient is formed.

        See docs/theory.md, "Sums without per-sample gradients".

        Args:
            rows: Powers of δ [b, S, o] of the whole chunk.
            x: Inputs [b, i]; None where the gradient is δ.

        Returns:
            Whether they were added.
        """
        scale = rows.scale
        if x is None:
            x2 = x4 = None
            length = x4_sum = rows.sums.new_empty(0)
        else:
            if scale is not None and x.dtype != torch.float64:
                x_scale = power_of_two_scale(x)
                x, scale = x * (1 / x_scale).to(x.dtype), scale * x_scale
            x2 = x.square()
            x4_sum = sums_of_squares(x2)
            if not in_float32_range(x4_sum, scale):
                return False
            # powers are computed in float32, sums over samples in float64
            length, x4_sum = x2.sum(-1).double(), x4_sum.double()
        self._add_powers(rows.sums if x is None else rows.sums * x4_sum, scale)
        inner = rows.inner if x is None else rows.inner * broadcast_samples(length, rows.inner)
        self.gram += inner if scale is None else inner * scale**2
        f = undo_scale(rows.f, scale)
        if self.sums_only:
            pass
        elif x2 is None:
            self.add_squares(f.sum(0)) if self.empty else self.a2.add_(f.sum(0))
        elif self.empty and f.dtype == self.a2.dtype:
            torch.mm(f.t(), x2, out=self.a2)
            self.empty = False
        else:
            self._zero_if_empty()
            self.a2.addmm_(f.t().to(self.a2.dtype), x2.to(self.a2.dtype))
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            x4 = None if x2 is None else x2.double().square()
            for total, delta_power in zip((self.a4, self.q, self.r), rows.entries, strict=True):
                total += (delta_power.sum(0) if x4 is None else delta_power.t() @ x4) * power
        return True

    def add_lookup_rows(
        self,
        sample: Tensor,
        token: Tensor,
        rows: Tensor,
        weights: PassWeights | None,
        scale: Tensor | None = None,
    ) -> bool:
        """Add the gradients of a lookup, given by the rows of the tokens that occur.

        Args:
            sample: Sample of each (sample, token) pair [U].
            token: Row of the parameter [U].
            rows: Gradients of that row [U, S, D], divided by ``scale``.
            weights: Weights of the chunk's passes.
            scale: See the class.

        Returns:
            Whether they were added.
        """
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
        if not self.sums_only:
            self._zero_if_empty()
            self.a2.index_add_(0, token, undo_scale(powers.f.to(self.a2.dtype), scale))
        if self.a4 is not None and self.q is not None and self.r is not None:
            power = 1.0 if scale is None else scale**4
            quartic, q, r = powers.entries(square, weights)
            self.a4.index_add_(0, token, quartic.sum(1) * power)
            self.q.index_add_(0, token, q * power)
            self.r.index_add_(0, token, r * power)
        return True

    def add_all_samples(self, g: Tensor, weights: PassWeights | None) -> None:
        """Add gradients of all samples of the chunk, scaled if necessary.

        Args:
            g: Per-sample gradients [b, S, *parameter].
            weights: Weights of the chunk's passes; None for labels drawn from the model.
        """
        samples = slice(0, len(g))
        where: Any = slice(None) if g.dim() > 2 else ...
        unscaled = torch.ones((), dtype=torch.float64, device=g.device)
        # on a CPU the range is checked first; with a scale ``add`` finds the right one itself
        if g.device.type != "cpu" or not self.add(g, samples, where, weights):
            self.add(g, samples, where, weights, unscaled)

    def add_squares(self, a2: Tensor) -> None:
        """Add Σ_b Σ_s w g² of every entry, computed elsewhere."""
        if self.sums_only:
            return
        if a2.dtype != self.a2.dtype:
            a2 = a2.to(self.a2.dtype)
        if a2.shape != self.a2.shape:
            a2 = a2.view(self.a2.shape)
        self.a2, self.empty = (a2, False) if self.empty else (self.a2 + a2, False)

    def add_entry_sums(self, a4: Tensor, q: Tensor, r: Tensor) -> None:
        """Add A4, Q and R of every entry, computed elsewhere, if they are kept.

        Args:
            a4: A4 of every entry, with as many entries as the parameter.
            q: Q of every entry.
            r: R of every entry.
        """
        for total, sums in zip((self.a4, self.q, self.r), (a4, q, r), strict=True):
            assert total is not None
            total += sums.view(total.shape)

    def add_sums(
        self,
        a2: Tensor,
        gram: Tensor,
        sums: Tensor,
        entries: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        """Add all sums of the whole chunk, computed elsewhere.

        Args:
            a2: Σ_b Σ_s w g² of every entry; may be the accumulator's own tensor, already filled.
            gram: Inner products [b, S, S], or squared norms [b, S].
            sums: A4, Q, R and top of each sample [4, b].
            entries: A4, Q and R of every entry; None where diagonals are not kept.
        """
        self.gram += gram
        self._add_powers(sums, None)
        if a2 is not self.a2 and not self.sums_only:
            self._zero_if_empty()
            self.a2 += a2
        self.empty = False
        if self.a4 is not None:
            assert entries is not None
            self.add_entry_sums(*entries)

    def result(self) -> Any:
        """A2: a DTensor if the parameter is sharded, an empty tensor if only sums are kept."""
        if self.sums_only:
            return self.a2.new_empty(0)
        return self.a2 if self.local_shard is None else self.local_shard

    def squared(self) -> Tensor:
        """A2 of this process's rows, initialised, for :func:`square_norms`."""
        if self.local_shard is not None:
            return self.local_shard.to_local()
        self._zero_if_empty()
        return self.a2

    def _zero_if_empty(self) -> None:
        """Initialise A2 before the first addition in place."""
        if self.empty:
            self.a2.zero_()
            self.empty = False

    def _add_powers(self, sums: Tensor, scale: Tensor | None, samples: slice | None = None) -> None:
        """Add A4, Q, R and top [4, b] of gradients that were divided by ``scale``."""
        totals = self.sums if samples is None else self.sums[:, samples]
        totals += sums if scale is None else sums * scale**4
