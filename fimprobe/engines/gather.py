"""One parameter's gradient from all its uses, summed before any power, in pieces that fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.contract import Accumulator, Weights, power_of_two
from fimprobe.engines.fused import add_fused, find_operands
from fimprobe.engines.layouts import batch_first
from fimprobe.engines.rules import LINEAR, Call, embedding_tokens
from fimprobe.engines.tape import Use

Live = list[tuple[Use, Call, list[Tensor]]]

CACHE_BYTES = 4 * 2**20
"""On a CPU the gradients at hand stay below this: fresh pages cost more than arithmetic."""

SMALL = 2**19
"""On a GPU so few numbers are taken in float64: to find a scale for them costs more launches."""


def contract_uses(
    accumulator: Accumulator,
    uses: list[Use],
    deltas: list[list[Tensor] | None],
    size: int,
    weights: Weights | None,
    room: float,
) -> None:
    """Add the moments of one parameter from all its uses."""
    shape = accumulator.a2.shape
    met = [(use, d) for use in uses if (d := use_deltas(use, deltas, size)) is not None]
    if not met:
        return
    operands = find_operands(met, weights)
    if operands is not None:
        add_fused(accumulator, operands, weights)
        return
    live: Live = []
    for use, delta in met:
        inputs = tuple(precise(x) for x in use.call.inputs)
        call = Call(use.call.module, inputs, use.call.folded)
        live.append((use, call, [precise(d) for d in delta]))
    use, call, delta = live[0]
    everyone = slice(0, size)
    if delta[0].device.type != "cpu" and len(delta) * size * math.prod(shape) <= SMALL:
        one = torch.ones((), dtype=torch.float64, device=delta[0].device)
        total = sum_uses(live, everyone, None, shape, None).double()
        accumulator.add(total, everyone, ..., one, weights)  # type: ignore[arg-type]
        return
    scale = _scale(live)
    if len(live) == 1 and use.rows is None:
        if use.rule is LINEAR["weight"] and call.inputs[0].dim() == 2:
            stacked = _stack(use, delta, everyone, None, scale)
            accumulator.add_outer(stacked, call.inputs[0], scale, weights)
            return
        if use.rule.tokens:
            stacked = _stack(use, delta, everyone, None, scale)
            accumulator.add_tokens(*embedding_tokens(call, stacked), scale, weights)
            return
    if delta[0].device.type == "cpu":
        room = min(room, CACHE_BYTES)
    bytes_each = len(delta) * math.prod(shape) * delta[0].element_size()
    tiled = all(u.rule.tiles and u.rows is None for u, _, _ in live) and len(shape) > 0
    rows = shape[0] if tiled else 1
    step = max(1, min(size, int(room / bytes_each)))
    tile = rows if bytes_each <= room else max(1, int(rows * room / bytes_each))
    for start in range(0, size, step):
        samples = slice(start, min(start + step, size))
        part = None if weights is None else weights.rows(samples)
        for row in range(0, rows, tile):
            where: Any = slice(row, row + tile) if tiled else ...
            total = sum_uses(live, samples, where if tiled else None, shape, scale)
            accumulator.add(total, samples, where, scale, part)


def sum_uses(
    live: Live, samples: slice, where: slice | None, shape: torch.Size, scale: Tensor | None
) -> Tensor:
    """Σ over uses of g [b, S, *tile] / scale: before any power is taken. ``scale`` None is 1."""
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
    elif use.rule.tiles or use.rule.outer:  # draws beside the channels: one product for all
        stacked = torch.stack(parts, -2).movedim(-2, 1)
    else:
        stacked = torch.stack(parts, 1)
    if (
        scale is None
        or stacked.dtype == torch.float64
        or (scale.device.type == "cpu" and float(scale) == 1)
    ):
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


def precise(x: Tensor) -> Tensor:
    """Half precision raised to float32: moments need its range and its digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
