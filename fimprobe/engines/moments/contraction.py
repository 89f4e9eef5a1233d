"""One parameter's gradient from all its uses, summed before any power, in pieces that fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.layers.rules import LINEAR, LayerCall, embedding_tokens
from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.moments.fused import Met, add_fused, find_operands
from fimprobe.engines.moments.power_sums import OuterProductPowers, is_one, power_of_two_scale
from fimprobe.engines.problem.weights import Weights
from fimprobe.engines.tracing.batch_layout import batch_first
from fimprobe.engines.tracing.tape import ParameterUse

MAX_FLOAT64_GPU_ELEMENTS = 2**19
"""On a GPU so few numbers are taken in float64: to find a scale for them costs more launches."""

Live = list[tuple[ParameterUse, LayerCall, list[Tensor]]]

CPU_CACHE_BYTES = 4 * 2**20
"""On a CPU the gradients at hand stay below this: fresh pages cost more than arithmetic."""


@dataclass
class Contraction:
    """Adds parameters' moments over one chunk of ``size`` samples, in pieces below ``room`` bytes."""

    size: int
    weights: Weights | None
    room: float
    known: dict[tuple[int, bool], OuterProductPowers | None] = field(default_factory=dict)
    """By edge: a layer's weight and bias share the powers of δ."""

    def add(self, accumulator: MomentAccumulator, met: Met, *, rescale: bool = False) -> bool:
        """Add the moments of one parameter from all its uses; whether they had to be rescaled.

        ``rescale``: they had to be the last time. Else, on a CPU, it is tried without.
        """
        operands = find_operands(met, self.weights)
        if operands is not None:
            add_fused(accumulator, operands, self.weights)
            return rescale
        live = in_full_precision(met)
        first = live[0][2][0]
        careful = rescale or (first.dtype != torch.float64 and first.device.type != "cpu")
        if is_outer(met):
            return self._outer_products(accumulator, live, careful)
        use = live[0][0]
        if len(live) == 1 and use.rows is None and use.rule.tokens:
            return self._lookups(accumulator, live, careful)
        if (
            first.device.type != "cpu"
            and len(live[0][2]) * self.size * accumulator.a2.numel() <= MAX_FLOAT64_GPU_ELEMENTS
        ):
            everyone = slice(0, self.size)
            g = sum_uses(live, everyone, None, accumulator.a2.shape, None).double()
            return not accumulator.add(g, everyone, ..., self.weights)
        return self._per_sample_gradients(accumulator, live, careful)

    def _outer_products(self, accumulator: MomentAccumulator, live: Live, careful: bool) -> bool:
        """δ xᵀ or δ: one use, one row for each sample."""
        use, call, delta = live[0]
        x = call.inputs[0] if use.rule.outer else None
        for again in (True,) if careful else (False, True):
            if (use.edge, again) not in self.known:
                stacked = _stack(use, delta, slice(0, self.size), None, None)
                made = OuterProductPowers.of(stacked, self.weights, rescale=again)
                self.known[use.edge, again] = made
            rows = self.known[use.edge, again]
            if rows is not None and accumulator.add_outer_products(rows, x):
                break
        return again

    def _lookups(self, accumulator: MomentAccumulator, live: Live, careful: bool) -> bool:
        """A lookup: only the rows of the tokens that occur."""
        use, call, delta = live[0]
        while True:
            scale = _scale(live) if careful else None
            stacked = _stack(use, delta, slice(0, self.size), None, scale)
            if accumulator.add_lookup_rows(*embedding_tokens(call, stacked), self.weights, scale):
                return careful
            careful = True

    def _per_sample_gradients(
        self, accumulator: MomentAccumulator, live: Live, careful: bool
    ) -> bool:
        """Per-sample gradients, of some samples and some rows of the parameter at a time."""
        shape, size, room = accumulator.a2.shape, self.size, self.room
        delta = live[0][2]
        if delta[0].device.type == "cpu":
            room = min(room, CPU_CACHE_BYTES)
        bytes_each = len(delta) * math.prod(shape) * delta[0].element_size()
        tiled = all(u.rule.tiles and u.rows is None for u, _, _ in live) and len(shape) > 0
        rows = shape[0] if tiled else 1
        step = max(1, min(size, int(room / bytes_each)))
        tile = rows if bytes_each <= room else max(1, int(rows * room / bytes_each))
        scale = _scale(live) if careful else None
        for start in range(0, size, step):
            samples = slice(start, min(start + step, size))
            part = None if self.weights is None else self.weights.rows(samples)
            for row in range(0, rows, tile):
                where: Any = slice(row, row + tile) if tiled else ...
                while True:
                    g = sum_uses(live, samples, where if tiled else None, shape, scale)
                    fresh = all(_memory(g) != _memory(d) for _, _, ds in live for d in ds)
                    if accumulator.add(g, samples, where, part, scale, fresh=fresh):
                        break
                    scale = _scale(live)
        return scale is not None


def is_outer(met: Met) -> bool:
    """Whether there is one use, of a Linear layer that saw one row for each sample."""
    if len(met) != 1 or met[0][0].rows is not None:
        return False
    use = met[0][0]
    return use.rule in (LINEAR["weight"], LINEAR["bias"]) and use.call.inputs[0].dim() == 2


def reached_uses(uses: list[ParameterUse], deltas: list[list[Tensor] | None], size: int) -> Met:
    """The uses that gradients arrive at, with these, batch first."""
    return [(use, d) for use in uses if (d := use_deltas(use, deltas, size)) is not None]


def in_full_precision(met: Met) -> Live:
    """The same with the calls, in float32 at least."""
    live: Live = []
    for use, delta in met:
        inputs = tuple(precise(x) for x in use.call.inputs)
        call = LayerCall(use.call.module, inputs, use.call.folded)
        live.append((use, call, [precise(d) for d in delta]))
    return live


def vectors(live: Live, shape: torch.Size) -> Tensor:
    """g [B, S, P] of all samples: of parameters that are no larger than the layer's output."""
    size, draws = len(live[0][2][0]), len(live[0][2])
    return sum_uses(live, slice(0, size), None, shape, None).reshape(size, draws, -1)


def sum_uses(
    live: Live, samples: slice, where: slice | None, shape: torch.Size, scale: Tensor | None
) -> Tensor:
    """Σ over uses of g [b, S, *tile] / scale: before any power is taken."""
    total: Tensor | None = None
    for use, call, delta in live:
        at = call.rows(samples)
        if use.rule.tiles or use.rule.outer:
            g = use.rule.gradient(at, _stack(use, delta, samples, where, scale))
        else:  # δ is larger than g here: the draws meet in g
            each = [_stack(use, [d], samples, where, scale) for d in delta]
            parts = [use.rule.gradient(at, d) for d in each]
            g = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if use.rows is not None:
            if total is None:
                total = g.new_zeros(*g.shape[:2], *shape)
            total[:, :, use.rows] += g
        else:
            total = g if total is None else total + g
    assert total is not None
    return total


def _stack(
    use: ParameterUse, delta: list[Tensor], samples: slice, where: slice | None, scale: Tensor | None
) -> Tensor:
    """δ [b, S, ...] of some samples (and rows of the parameter), divided by ``scale``."""
    parts = [d[samples] if where is None else d[samples][..., where] for d in delta]
    if len(parts) == 1:
        stacked = parts[0].unsqueeze(1)
    else:
        stacked = torch.stack(parts, 1)
    if scale is None or stacked.dtype == torch.float64 or is_one(scale):
        return stacked
    return stacked * (1 / scale).to(stacked.dtype)


def _scale(live: Live) -> Tensor:
    first = live[0][2][0]
    if first.dtype == torch.float64:
        return torch.ones((), dtype=torch.float64, device=first.device)
    scales = [
        power_of_two_scale(d, *(call.inputs if use.rule.outer else ()))
        for use, call, delta in live
        for d in delta
    ]
    return torch.stack(scales).max() if len(scales) > 1 else scales[0]


def use_deltas(
    use: ParameterUse, deltas: list[list[Tensor] | None], size: int
) -> list[Tensor] | None:
    """δ of a use for each draw, batch first."""
    delta = deltas[use.edge]
    return None if delta is None else [batch_first(d, use.layout, size) for d in delta]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def precise(x: Tensor) -> Tensor:
    """Half precision raised to float32: moments need its range and its digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
