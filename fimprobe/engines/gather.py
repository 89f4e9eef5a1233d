"""One parameter's gradient from all its uses, summed before any power, in pieces that fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.contract import Accumulator, Weights, power_of_two
from fimprobe.engines.rules import Call, embedding_tokens
from fimprobe.engines.tape import Use

Live = list[tuple[Use, Call, Tensor]]


def contract_uses(
    accumulator: Accumulator,
    uses: list[Use],
    deltas: list[Tensor | None],
    size: int,
    weights: Weights | None,
    room: float,
) -> None:
    """Add the moments of one parameter from all its uses."""
    shape = accumulator.a2.shape
    live = []
    for use in uses:
        delta = use_delta(use, deltas, size)
        if delta is not None:
            inputs = tuple(precise(x) for x in use.call.inputs)
            call = type(use.call)(use.call.module, inputs, use.call.folded)
            live.append((use, call, precise(delta)))
    if not live:
        return
    scale = _scale([(call.inputs if use.rule.outer else (), d) for use, call, d in live])
    live = [(use, call, _rescaled(d, scale)) for use, call, d in live]
    use, call, delta = live[0]
    if len(live) == 1 and use.rows is None:
        if (
            use.rule.outer
            and call.inputs[0].dim() == 2
            and shape
            == (
                delta.shape[-1],
                call.inputs[0].shape[-1],
            )
        ):
            accumulator.add_outer(delta, call.inputs[0], scale, weights)
            return
        if use.rule.tokens:
            accumulator.add_tokens(*embedding_tokens(call, delta), scale, weights)
            return
    draws = delta.shape[1]
    bytes_each = draws * math.prod(shape) * delta.element_size()
    tiled = all(u.rule.tiles and u.rows is None for u, _, _ in live) and len(shape) > 0
    tile = shape[0] if len(shape) > 0 else 1
    step = size
    if bytes_each * size > room:
        step = max(1, int(room / bytes_each))
        if bytes_each > room and tiled:
            tile = max(1, int(shape[0] * room / bytes_each))
    for start in range(0, size, step):
        samples = slice(start, min(start + step, size))
        part = None if weights is None else weights.rows(samples)
        for row in range(0, shape[0] if len(shape) else 1, tile):
            where = slice(row, row + tile) if tiled else slice(None)
            total = sum_uses(live, samples, where, tiled, shape)
            accumulator.add(total, samples, where if len(shape) else ..., scale, part)  # type: ignore[arg-type]
            if not tiled:
                break


def sum_uses(live: list[Any], samples: slice, where: slice, tiled: bool, shape: torch.Size) -> Tensor:
    """Σ over uses of g [b, S, *tile]: before any power is taken."""
    total: Tensor | None = None
    for use, call, delta in live:
        part = delta[samples]
        if tiled:
            part = part[..., where]
        g = use.rule.gradient(call.rows(samples), part)
        if use.rows is not None:
            if total is None:
                total = g.new_zeros(*g.shape[:2], *shape)
            total[:, :, use.rows] += g
        else:
            total = g if total is None else total + g
    assert total is not None
    return total


def _scale(groups: list[tuple[tuple[Tensor, ...], Tensor]]) -> Tensor:
    first = groups[0][1]
    if first.dtype == torch.float64:
        return torch.ones((), dtype=torch.float64, device=first.device)
    return torch.stack([power_of_two(delta, *inputs) for inputs, delta in groups]).max()


def _rescaled(delta: Tensor, scale: Tensor) -> Tensor:
    if delta.dtype == torch.float64 or (delta.device.type == "cpu" and float(scale) == 1):
        return delta
    return delta * (1 / scale).to(delta.dtype)


def use_delta(use: Use, deltas: list[Tensor | None], size: int) -> Tensor | None:
    """δ of a use as [B, S, ...]."""
    delta = deltas[use.edge]
    if delta is None:
        return None
    if use.layout == 0:
        return delta.transpose(0, 1)
    if use.layout == 1:
        return delta.movedim(2, 0)
    return delta.unflatten(1, (size, -1)).transpose(0, 1)


def precise(x: Tensor) -> Tensor:
    """Half precision raised to float32: moments need its range and its digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
