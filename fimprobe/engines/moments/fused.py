"""Moments of a large weight without its per-sample gradients: operands in, sums out, one kernel.

G_bs[o, i] = Σ_t δ_bs[t, o] x_b[t, i] + Σ_t [token_b[t] = o] ρ_bs[t, i]: a Linear layer (or
transformers' Conv1D) that is used at many positions, a lookup, or both where they share a weight.
Tiles of G live in registers only (:mod:`fimprobe.engines.moments.triton_kernel`); half precision
stays as it is and is summed in float32. Nothing here waits for the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.layers.rules import conv1d_weight, linear_weight
from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.moments.power_sums import drawn
from fimprobe.engines.problem.weights import Weights
from fimprobe.engines.tracing.tape import ParameterUse

MOST_DRAWS = 4
"""Tiles of all draws are in registers at once, for their inner products."""

FILL = 264
"""Programs that fill a large GPU twice; weights of fewer tiles share their samples out."""

INTERPRET = False
"""Tests set this, and TRITON_INTERPRET=1: the kernel then runs on the CPU, slowly."""

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

Met = list[tuple[ParameterUse, list[Tensor]]]
"""The uses of one parameter with their δ [B, ...], one for each draw."""


@dataclass(frozen=True)
class Operands:
    """What makes up the gradient [O, I] of one weight: x [B, T, I] with δ [B, T, O] for each draw,
    tokens [B, K] with ρ [B, K, I] for each draw, or both. ``transposed``: it is kept as [I, O].
    """

    x: Tensor | None = None
    deltas: tuple[Tensor, ...] = ()
    tokens: Tensor | None = None
    rows: tuple[Tensor, ...] = ()
    padding: int | None = None
    transposed: bool = False


def find_operands(met: Met, weights: Weights | None) -> Operands | None:
    """The operands, where the kernel covers this weight on this device; None where it does not.

    Covered: up to MOST_DRAWS drawn labels, or passes of a single block, one use in a Linear or
    Conv1D layer at several positions, one lookup, float32 and half precision.
    """
    first = met[0][1]
    if not _runs_on(first[0].device) or len(first) > MOST_DRAWS or len(met) > 2:
        return None
    if not drawn(weights) and weights is not None and len(set(weights.blocks)) > 1:
        return None
    parts: dict[str, Any] = {}
    for use, deltas in met:
        found = _read(use, deltas)
        if found is None or found.keys() & parts.keys():
            return None
        parts |= found
    if parts.get("transposed") and "tokens" in parts:
        return None
    return Operands(**parts)


def add_fused(accumulator: MomentAccumulator, operands: Operands, weights: Weights | None) -> None:
    """Add the moments of one weight, over all samples of the chunk."""
    from fimprobe.engines.moments.triton_kernel import (
        SMALLEST,  # optional: needs triton
        launch,
    )

    shape = accumulator.a2.shape
    outs, ins = reversed(shape) if operands.transposed else shape
    dense, lookup = operands.deltas, operands.rows
    device = (dense or lookup)[0].device
    samples, draws = len((dense or lookup)[0]), len(dense or lookup)
    share = -(-samples // _parts(samples, outs, ins, accumulator.diagonals))
    parts = -(-samples // share)
    fresh = accumulator.empty and parts == 1  # never where A2 is not wanted
    a2 = (
        accumulator.a2.unsqueeze(0)
        if fresh
        else torch.empty((parts, *shape), dtype=torch.float32, device=device)
    )
    sampled = drawn(weights)
    second_weights = None if weights is None else weights.second
    a4 = q = r = None
    if accumulator.diagonals:
        a4, q = (torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2))
        r = torch.empty(shape, dtype=torch.float64, device=device) if sampled else q
    pairs = draws * (draws + 1) // 2
    tiles = -(-outs // SMALLEST) * -(-ins // SMALLEST)
    sums = torch.zeros((tiles, samples, pairs + draws + 3), device=device)
    x, tokens = operands.x, operands.tokens
    positions = 0 if x is None else x.shape[1]
    lookups = 0 if tokens is None else tokens.shape[1]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch(
            lambda at: (-(-outs // at["BO"]) * -(-ins // at["BI"]), parts),
            x,
            dense,
            tokens,
            lookup,
            None if second_weights is None else second_weights.float().contiguous(),
            None if weights is None else weights.fourth.double().contiguous(),
            a2,
            a4,
            q,
            r,
            sums,
            *(samples, positions, lookups, outs, ins, share),
            -2 if operands.padding is None else operands.padding,
            *((0, 0, 0) if x is None else x.stride()),
            *((0, 0, 0) if x is None else dense[0].stride()),
            *((0, 0) if tokens is None else tokens.stride()),
            *((0, 0, 0) if tokens is None else lookup[0].stride()),
            *(a2.mT if operands.transposed else a2).stride(),
            _bucket(max(positions, lookups)),
            S=draws,
            DENSE=x is not None,
            LOOKUP=tokens is not None,
            WEIGHTED=not sampled,
            QUARTIC_WEIGHTED=weights is not None,
            DIAGONALS=accumulator.diagonals,
            PRECISION="ieee",
            RAISE=INTERPRET,
        )
    wide = sums.double()
    scale = wide[..., -1:].square()
    second = (wide[..., :pairs] * scale).sum(0)
    fourth = (wide[..., pairs:-1] * scale.square()).sum(0)
    norms = fourth[:, :draws]
    quartic = (norms if weights is None else norms * weights.fourth).sum(1)
    q_sum = fourth[:, draws]
    r_sum = norms.sum(1) if sampled else q_sum
    accumulator.add_sums(
        accumulator.a2 if fresh else a2.sum(0),
        _gram(second, draws),
        torch.stack([quartic, q_sum, r_sum, fourth[:, draws + 1]]),
        None if a4 is None or q is None or r is None else (a4, q, r),
    )


def _runs_on(device: torch.device) -> bool:
    if device.type != "cuda":
        return INTERPRET
    return _has_triton() and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _read(use: ParameterUse, deltas: list[Tensor]) -> dict[str, Any] | None:
    """The operands of one use."""
    given = use.call.inputs[0]
    if use.rows is not None or deltas[0].dtype not in _TYPES:
        return None
    if use.rule.tokens and type(use.call.module) is nn.Embedding:
        tokens = given.reshape(len(given), -1)
        rows = _alike([d.reshape(*tokens.shape, d.shape[-1]) for d in deltas])
        return {"tokens": tokens, "rows": rows, "padding": use.call.module.padding_idx}
    if use.rule.gradient not in (linear_weight, conv1d_weight) or given.dim() < 3:
        return None
    kind = torch.promote_types(given.dtype, deltas[0].dtype)
    if kind not in _TYPES:
        return None
    x = given.reshape(len(given), -1, given.shape[-1]).to(kind)
    dense = _alike([d.reshape(*x.shape[:2], d.shape[-1]).to(kind) for d in deltas])
    return {"x": x, "deltas": dense, "transposed": use.rule.gradient is conv1d_weight}


def _alike(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """All with the same strides, as the kernel reads them."""
    if len({t.stride() for t in tensors}) > 1:
        return tuple(t.contiguous() for t in tensors)
    return tuple(tensors)


def _parts(samples: int, outs: int, ins: int, whole: bool) -> int:
    """How many programs share out the samples of one tile: few, each keeps a tile of A2."""
    tiles = -(-outs // 128) * -(-ins // 128)
    return 1 if whole else max(1, min(samples, FILL // tiles))


def _bucket(positions: int) -> int:
    """Positions by powers of two from 64 to 4096: other lengths are not timed anew."""
    return 1 << min(max(positions - 1, 63).bit_length(), 12)


def _gram(pairs: Tensor, draws: int) -> Tensor:
    """Inner products [B, S, S] from their upper triangle [B, S(S+1)/2]; [B, 1] for one draw."""
    if draws == 1:
        return pairs
    # pair (s, other) with s ≤ other follows the s rows above it, of S, S − 1, ... pairs
    corners = [sorted((s, other)) for s in range(draws) for other in range(draws)]
    rows = [pairs[:, s * draws - s * (s - 1) // 2 + other - s] for s, other in corners]
    return torch.stack(rows, 1).unflatten(1, (draws, draws))
