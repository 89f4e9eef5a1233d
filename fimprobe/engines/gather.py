"""One parameter's gradient from all its uses, summed before any power, in pieces that fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.contract import Accumulator, RowPowers, Weights, is_one, power_of_two
from fimprobe.engines.layouts import batch_first
from fimprobe.engines.rules import LINEAR, Call, embedding_tokens
from fimprobe.engines.tape import Use

Live = list[tuple[Use, Call, list[Tensor]]]

CACHE_BYTES = 4 * 2**20
"""On a CPU the gradients at hand stay below this: fresh pages cost more than arithmetic."""


def contract_uses(
    accumulator: Accumulator,
    live: Live,
    size: int,
    weights: Weights | None,
    room: float,
    *,
    rescale: bool = False,
) -> bool:
    """Add the moments of one parameter from all its uses; whether they had to be rescaled.

    ``rescale``: they had to be the last time. On a CPU it is tried without.
    """
    shape = accumulator.a2.shape
    first = live[0][2][0]
    careful = rescale or (first.dtype != torch.float64 and first.device.type != "cpu")
    use, call, delta = live[0]
    if len(live) == 1 and use.rows is None:
        if use.rule.tokens:
            for scale in (None, None) if not careful else (None,):
                scale = _scale(live) if careful else None
                stacked = _stack(use, delta, slice(0, size), None, scale)
                if accumulator.add_tokens(*embedding_tokens(call, stacked), weights, scale):
                    return careful
                careful = True
    if first.device.type == "cpu":
        room = min(room, CACHE_BYTES)
    bytes_each = len(delta) * math.prod(shape) * first.element_size()
    tiled = all(u.rule.tiles and u.rows is None for u, _, _ in live) and len(shape) > 0
    rows = shape[0] if tiled else 1
    step = max(1, min(size, int(room / bytes_each)))
    tile = rows if bytes_each <= room else max(1, int(rows * room / bytes_each))
    scale = _scale(live) if careful else None
    for start in range(0, size, step):
        samples = slice(start, min(start + step, size))
        part = None if weights is None else weights.rows(samples)
        for row in range(0, rows, tile):
            where: Any = slice(row, row + tile) if tiled else ...
            while True:
                g = sum_uses(live, samples, where if tiled else None, shape, scale)
                fresh = all(_memory(g) != _memory(d) for _, _, ds in live for d in ds)
                if accumulator.add(g, samples, where, part, scale, fresh=fresh):
                    break
                scale = _scale(live)
    return scale is not None


@dataclass
class Outers:
    """Parameters whose gradient is δ xᵀ or δ for each sample; those of one layer share δ's powers."""

    size: int
    weights: Weights | None
    known: dict[int, RowPowers | None] = field(default_factory=dict)

    @staticmethod
    def fit(live: Live) -> bool:
        """Whether there is one use, of a layer that saw one row for each sample."""
        if len(live) != 1 or live[0][0].rows is not None:
            return False
        use, call, _ = live[0]
        return use.rule in (LINEAR["weight"], LINEAR["bias"]) and call.inputs[0].dim() == 2

    def add(self, accumulator: Accumulator, live: Live, *, rescale: bool) -> bool:
        """Add the moments; whether they had to be rescaled."""
        use, call, delta = live[0]
        x = call.inputs[0] if use.rule.outer else None
        wide = delta[0].dtype == torch.float64
        if not rescale and (wide or delta[0].device.type == "cpu"):
            if use.edge not in self.known:
                stacked = _stack(use, delta, slice(0, self.size), None, None)
                self.known[use.edge] = RowPowers.of(stacked, self.weights, rescale=False)
            rows = self.known[use.edge]
            if rows is not None and accumulator.add_rows(rows, x):
                return False
        stacked = _stack(use, delta, slice(0, self.size), None, None)
        rows = RowPowers.of(stacked, self.weights, rescale=True)
        assert rows is not None
        return accumulator.add_rows(rows, x)


def live_uses(uses: list[Use], deltas: list[list[Tensor] | None], size: int) -> Live:
    """The uses that gradients arrive at, with these, batch first and in float32 at least."""
    live: Live = []
    for use in uses:
        delta = use_deltas(use, deltas, size)
        if delta is not None:
            inputs = tuple(precise(x) for x in use.call.inputs)
            call = Call(use.call.module, inputs, use.call.folded)
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
    use: Use, delta: list[Tensor], samples: slice, where: slice | None, scale: Tensor | None
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
        power_of_two(d, *(call.inputs if use.rule.outer else ()))
        for use, call, delta in live
        for d in delta
    ]
    return torch.stack(scales).max() if len(scales) > 1 else scales[0]


def use_deltas(use: Use, deltas: list[list[Tensor] | None], size: int) -> list[Tensor] | None:
    """δ of a use for each draw, batch first."""
    delta = deltas[use.edge]
    return None if delta is None else [batch_first(d, use.layout, size) for d in delta]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def precise(x: Tensor) -> Tensor:
    """Half precision raised to float32: moments need its range and its digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
