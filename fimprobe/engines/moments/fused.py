"""Moments of a large weight without its per-sample gradients, by one fused kernel.

G_bs[o, i] = Σ_t δ_bs[t, o] x_b[t, i] + Σ_t [token_b[t] = o] ρ_bs[t, i]: a Linear layer (or the
Conv1D of transformers) that is applied at many positions, a lookup, or both if they share a weight.
Tiles of G exist in registers only (:mod:`fimprobe.engines.moments.triton_kernel`). Operands in half
precision are multiplied as they are and summed in float32. Nothing here waits for the GPU.

Symbols: B samples, S draws, T positions, K looked-up tokens, weight [O, I].
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
from fimprobe.engines.moments.power_sums import coincidence_sums, has_sampled_labels
from fimprobe.engines.problem.weights import PassWeights
from fimprobe.engines.tracing.tape import ParameterUse

MAX_DRAWS = 4
"""Tiles of all draws are in registers at once, for their inner products."""

MIN_PROGRAMS = 264
"""Programs that fill the 132 multiprocessors of an H100 or H200 twice.

The samples of a weight with fewer tiles are shared among several programs.
"""

INTERPRET = False
"""Tests set this, and TRITON_INTERPRET=1: the kernel then runs on the CPU, slowly."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ReachedUses = list[tuple[ParameterUse, list[Tensor]]]
"""The uses of one parameter that cotangents reach, with their δ [B, ...] for each draw."""


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Factors of the per-sample gradients [O, I] of one weight.

    Attributes:
        x: Inputs of a dense layer [B, T, I]; None without one.
        deltas: Its δ [B, T, O] for each draw.
        tokens: Tokens of a lookup [B, K]; None without one.
        rows: Its cotangents ρ [B, K, I] for each draw.
        padding: The token whose row has no gradient.
        transposed: Whether the weight is stored as [I, O].
    """

    x: Tensor | None = None
    deltas: tuple[Tensor, ...] = ()
    tokens: Tensor | None = None
    rows: tuple[Tensor, ...] = ()
    padding: int | None = None
    transposed: bool = False

    @property
    def cotangents(self) -> tuple[Tensor, ...]:
        """δ, or ρ without a dense layer: one [B, ...] for each draw."""
        return self.deltas or self.rows


def find_operands(reached: ReachedUses, weights: PassWeights | None) -> Operands | None:
    """The operands of the kernel; None if it does not cover this weight on this device.

    It covers up to ``MAX_DRAWS`` drawn labels, or passes of a single block; one use in a Linear or
    Conv1D layer at several positions, one lookup, or both; float32 and half precision.

    Args:
        reached: The uses of one parameter that cotangents reach; at least one.
        weights: Weights of the passes.
    """
    deltas = reached[0][1]
    if not _runs_on(deltas[0].device) or len(deltas) > MAX_DRAWS or len(reached) > 2:
        return None
    if not has_sampled_labels(weights) and weights is not None and len(set(weights.block)) > 1:
        return None
    operands: dict[str, Any] = {}
    for use, use_deltas in reached:
        use_operands = _operands_of(use, use_deltas)
        if use_operands is None or use_operands.keys() & operands.keys():
            return None
        operands |= use_operands
    if operands.get("transposed") and "tokens" in operands:
        return None
    return Operands(**operands)


def add_fused(
    accumulator: MomentAccumulator, operands: Operands, weights: PassWeights | None
) -> None:
    """Add the moments of one weight, over all samples of the chunk.

    Args:
        accumulator: The weight's accumulator.
        operands: Factors of its gradients.
        weights: Weights of the passes.
    """
    shape, device = accumulator.a2.shape, operands.cotangents[0].device
    outs, ins = reversed(shape) if operands.transposed else shape
    samples = len(operands.cotangents[0])
    share = -(-samples // _sample_shares(samples, outs, ins, accumulator.diagonals))
    num_shares = -(-samples // share)
    # the kernel writes to the accumulator itself; never if A2 is not kept
    in_place = accumulator.empty and num_shares == 1
    a2 = accumulator.a2.unsqueeze(0)
    if not in_place:
        a2 = torch.empty((num_shares, *shape), dtype=torch.float32, device=device)
    entries: tuple[Tensor, Tensor, Tensor] | None = None
    if accumulator.diagonals:
        a4, q = (torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2))
        # for the exact passes of one block R is Q, and the kernel writes no R
        r = torch.empty_like(q) if has_sampled_labels(weights) else q
        entries = (a4, q, r)
    sums = _run_kernel(operands, weights, a2, entries, share)
    gram, powers = _sums_of_samples(sums, len(operands.cotangents), weights)
    accumulator.add_sums(accumulator.a2 if in_place else a2.sum(0), gram, powers, entries)


def _run_kernel(
    operands: Operands,
    weights: PassWeights | None,
    a2: Tensor,
    entries: tuple[Tensor, Tensor, Tensor] | None,
    share: int,
) -> Tensor:
    """Launch the kernel; it fills ``a2`` and ``entries``.

    Args:
        operands: Factors of the gradients.
        weights: Weights of the passes.
        a2: Σ_b Σ_s w g² of every entry, for each share of the samples [shares, *shape].
        entries: A4, Q and R of every entry; None if they are not kept.
        share: Samples of each share.

    Returns:
        Sums of each tile and sample [tiles, B, S (S + 1)/2 + S + 3]: inner products, Σ g⁴ of each
        draw, Σ F², Σ F max_s g², all of gradients over a scale, and that scale.
    """
    from fimprobe.engines.moments.triton_kernel import MIN_TILE, launch  # optional: needs triton

    x, tokens, dense, lookup = operands.x, operands.tokens, operands.deltas, operands.rows
    samples, draws = len(operands.cotangents[0]), len(operands.cotangents)
    device = operands.cotangents[0].device
    outs, ins = reversed(a2.shape[1:]) if operands.transposed else a2.shape[1:]
    tiles = -(-outs // MIN_TILE) * -(-ins // MIN_TILE)
    sums = torch.zeros((tiles, samples, draws * (draws + 1) // 2 + draws + 3), device=device)
    positions = 0 if x is None else x.shape[1]
    lookups = 0 if tokens is None else tokens.shape[1]
    square_weights = None if weights is None else weights.square
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch(
            lambda at: (-(-outs // at["BO"]) * -(-ins // at["BI"]), len(a2)),
            x,
            dense,
            tokens,
            lookup,
            None if square_weights is None else square_weights.float().contiguous(),
            None if weights is None else weights.quartic.double().contiguous(),
            a2,
            *((None, None, None) if entries is None else entries),
            sums,
            *(samples, positions, lookups, outs, ins, share),
            -2 if operands.padding is None else operands.padding,  # -1 marks places past the end
            *((0, 0, 0) if x is None else x.stride()),
            *((0, 0, 0) if x is None else dense[0].stride()),
            *((0, 0) if tokens is None else tokens.stride()),
            *((0, 0, 0) if tokens is None else lookup[0].stride()),
            *(a2.mT if operands.transposed else a2).stride(),
            _position_bucket(max(positions, lookups)),
            S=draws,
            DENSE=x is not None,
            LOOKUP=tokens is not None,
            WEIGHTED=not has_sampled_labels(weights),
            QUARTIC_WEIGHTED=weights is not None,
            DIAGONALS=entries is not None,
            PRECISION="ieee",
            RAISE=INTERPRET,
        )
    return sums


def _sums_of_samples(sums: Tensor, draws: int, weights: PassWeights | None) -> tuple[Tensor, Tensor]:
    """Add up the tiles' sums [tiles, B, ...] in float64.

    Returns:
        Inner products [B, S, S] (squared norms [B, 1] of one draw); A4, Q, R and top [4, B].
    """
    pairs = draws * (draws + 1) // 2
    wide = sums.double()
    scale = wide[..., -1:].square()
    second = (wide[..., :pairs] * scale).sum(0)
    fourth = (wide[..., pairs:-1] * scale.square()).sum(0)
    norms, q, top = fourth[:, :draws], fourth[:, draws], fourth[:, draws + 1]
    if has_sampled_labels(weights):
        top = coincidence_sums(norms, weights)
    a4 = (norms if weights is None else norms * weights.quartic).sum(1)
    r = norms.sum(1) if has_sampled_labels(weights) else q
    return _gram(second, draws), torch.stack([a4, q, r, top])


def _runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device: a GPU with bfloat16 tensor cores, or the interpreter."""
    if device.type != "cuda":
        return INTERPRET
    return _has_triton() and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _operands_of(use: ParameterUse, deltas: list[Tensor]) -> dict[str, Any] | None:
    """The fields of :class:`Operands` that one use contributes; None if it is not covered."""
    inputs = use.call.inputs[0]
    if use.rows is not None or deltas[0].dtype not in _DTYPES:
        return None
    if use.rule.lookup and type(use.call.module) is nn.Embedding:
        tokens = inputs.reshape(len(inputs), -1)
        rows = _with_equal_strides([d.reshape(*tokens.shape, d.shape[-1]) for d in deltas])
        return {"tokens": tokens, "rows": rows, "padding": use.call.module.padding_idx}
    if use.rule.gradient not in (linear_weight, conv1d_weight) or inputs.dim() < 3:
        return None
    dtype = torch.promote_types(inputs.dtype, deltas[0].dtype)
    if dtype not in _DTYPES:
        return None
    x = inputs.reshape(len(inputs), -1, inputs.shape[-1]).to(dtype)
    dense = _with_equal_strides([d.reshape(*x.shape[:2], d.shape[-1]).to(dtype) for d in deltas])
    return {"x": x, "deltas": dense, "transposed": use.rule.gradient is conv1d_weight}


def _with_equal_strides(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The tensors with the same strides, which the kernel reads once for all of them."""
    if len({t.stride() for t in tensors}) > 1:
        return tuple(t.contiguous() for t in tensors)
    return tuple(tensors)


def _sample_shares(samples: int, outs: int, ins: int, whole: bool) -> int:
    """The number of programs that share the samples of one tile; each keeps a tile of A2.

    ``whole``: diagonals are kept, whose float64 tiles are written by one program only.
    """
    tiles = -(-outs // 128) * -(-ins // 128)
    return 1 if whole else max(1, min(samples, MIN_PROGRAMS // tiles))


def _position_bucket(positions: int) -> int:
    """The next power of two from 64 to 4096: other lengths are not tuned again."""
    return 1 << min(max(positions - 1, 63).bit_length(), 12)


def _gram(pairs: Tensor, draws: int) -> Tensor:
    """Inner products [B, S, S] from their upper triangle [B, S(S+1)/2]; [B, 1] for one draw."""
    if draws == 1:
        return pairs
    # pair (s, other) with s ≤ other follows the s rows above it, of S, S − 1, ... pairs
    corners = [sorted((s, other)) for s in range(draws) for other in range(draws)]
    rows = [pairs[:, s * draws - s * (s - 1) // 2 + other - s] for s, other in corners]
    return torch.stack(rows, 1).unflatten(1, (draws, draws))
