"""The Triton kernel behind :mod:`fimprobe.engines.moments.fused`; no other file imports triton.

A program computes one tile [BO, BI] of a weight's gradient for a share of the samples. For each
sample the tile g_s of every draw s is summed over positions in registers, in float32, and its powers
are formed there. For each sample and tile a few sums are stored, and Σ_b Σ_s w g² at the end.

Triton inlines the helpers: they cost nothing on a device. Upper-case arguments are pointers (or
compile-time constants); a kernel has no records to bundle them, hence the long lists of arguments.
"""

# mypy: ignore-errors
# (the body of a kernel is Triton's language, not Python)
# ruff: noqa: PLR0917
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

MIN_TILE = 64
"""Least side of a tile in ``CONFIGURATIONS``; the workspace has room for that many tiles."""

CONFIGURATIONS = [
    triton.Config({"BO": o, "BI": i, "BT": t}, num_warps=warps, num_stages=stages)
    for o, i, t, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 4),
        (128, 64, 64, 8, 3),
        (64, 128, 64, 8, 3),
        (64, 64, 64, 4, 4),
        (64, 64, 32, 4, 3),
    )
]
"""Candidates for the tuner: tile [BO, BI], BT positions at a time. The last tile is the least."""


@triton.jit
def _add_positions(
    g, X, DELTA, b, o, i, o_in, i_in, positions,
    x_b, x_t, x_i, d_b, d_t, d_o,
    S: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Return g_s[o, i] + Σ_t DELTA_s[t, o] X[t, i] of sample b, for every draw s."""
    t = tl.arange(0, BT)
    for start in range(0, positions, BT):
        at = start + t
        t_in = at < positions
        x = tl.load(
            X + b * x_b + at[:, None].to(tl.int64) * x_t + i[None, :] * x_i,
            mask=t_in[:, None] & i_in[None, :],
            other=0.0,
        )
        if RAISE:
            x = x.to(tl.float32)
        new = ()
        for s in tl.static_range(S):
            d = tl.load(
                DELTA[s] + b * d_b + at[:, None].to(tl.int64) * d_t + o[None, :] * d_o,
                mask=t_in[:, None] & o_in[None, :],
                other=0.0,
            )
            if RAISE:
                d = d.to(tl.float32)
            new = new + (tl.dot(tl.trans(d), x, g[s], input_precision=PRECISION),)
        g = new
    return g


@triton.jit
def _add_lookups(
    g, TOKENS, ROWS, b, o, i, i_in, lookups, padding,
    k_b, k_t, r_b, r_t, r_i,
    S: tl.constexpr, PRECISION: tl.constexpr, RAISE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Return g_s[o, i] + Σ_t [TOKENS[t] = o] ROWS_s[t, i] of sample b, for every draw s."""
    t = tl.arange(0, BT)
    for start in range(0, lookups, BT):
        at = start + t
        token = tl.load(TOKENS + b * k_b + at * k_t, mask=at < lookups, other=-1)
        token = tl.where(token == padding, -1, token)
        hit = token[:, None] == o[None, :]
        # few tiles hold a token of the sample: most programs load no rows
        if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
            new = ()
            for s in tl.static_range(S):
                r = tl.load(
                    ROWS[s] + b * r_b + at[:, None].to(tl.int64) * r_t + i[None, :] * r_i,
                    mask=(at < lookups)[:, None] & i_in[None, :],
                    other=0.0,
                )
                if RAISE:
                    r = r.to(tl.float32)
                one_hot = tl.trans(hit.to(r.dtype))
                new = new + (tl.dot(one_hot, r, g[s], input_precision=PRECISION),)
            g = new
    return g


@triton.jit
def _power_of_two_scale(g, S: tl.constexpr):
    """Return a power of two near the tile's largest entry, and its inverse.

    Fourth powers of the scaled tile stay inside float32's range. The exponent is read from the bits,
    and kept where both the scale and its inverse are normal numbers.
    """
    top = 0.0
    for s in tl.static_range(S):
        top = tl.maximum(top, tl.max(tl.max(tl.abs(g[s]), 1), 0))
    exponent = top.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    scale = exponent.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def _store_powers(
    g, inverse, OUT, SECOND, b,
    S: tl.constexpr, WEIGHTED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Store one sample's sums over the scaled tile at OUT; return F = Σ_s w g² of the scaled tile.

    Columns: inner products of the draws (upper triangle), Σ g⁴ of each draw, Σ F², Σ F max_s g².
    """
    PAIRS: tl.constexpr = S * (S + 1) // 2
    f = tl.zeros((BO, BI), tl.float32)
    peak = tl.zeros((BO, BI), tl.float32)
    column = 0
    for s in tl.static_range(S):
        h = g[s] * inverse
        square = h * h
        for other in tl.static_range(s, S):
            tl.store(OUT + column, tl.sum(tl.sum(h * (g[other] * inverse), 1), 0))
            column += 1
        tl.store(OUT + PAIRS + s, tl.sum(tl.sum(square * square, 1), 0))
        if WEIGHTED:
            f += square * tl.load(SECOND + b * S + s)
            peak = tl.maximum(peak, square)
        else:
            f += square
    tl.store(OUT + PAIRS + S, tl.sum(tl.sum(f * f, 1), 0))
    if WEIGHTED:
        tl.store(OUT + PAIRS + S + 1, tl.sum(tl.sum(f * peak, 1), 0))
    return f


@triton.jit
def _add_fourth_powers(
    g, a4, r, FOURTH, b,
    S: tl.constexpr, WEIGHTED: tl.constexpr, QUARTIC_WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Return a4 + Σ_s w₄ g⁴ and, for drawn labels, r + Σ_s g⁴ of every entry, in float64."""
    for s in tl.static_range(S):
        wide = g[s].to(tl.float64)
        wide = wide * wide
        fourth = wide * wide
        if not WEIGHTED:
            r += fourth
        if QUARTIC_WEIGHTED:
            fourth = fourth * tl.load(FOURTH + b * S + s)
        a4 += fourth
    return a4, r


@triton.jit
def moments(
    X, DELTA, TOKENS, ROWS, SECOND, FOURTH, A2, A4, Q, R, SUMS,
    samples, positions, lookups, outs, ins, share, padding,
    x_b, x_t, x_i, d_b, d_t, d_o, k_b, k_t, r_b, r_t, r_i, a_p, a_o, a_i, bucket,
    S: tl.constexpr, DENSE: tl.constexpr, LOOKUP: tl.constexpr, WEIGHTED: tl.constexpr,
    QUARTIC_WEIGHTED: tl.constexpr, DIAGONALS: tl.constexpr,
    PRECISION: tl.constexpr, RAISE: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Moments of g_s[o, i] = Σ_t DELTA_s[t, o] X[t, i] + Σ_t [TOKENS[t] = o] ROWS_s[t, i].

    Program (tile, part) sums its ``share`` of the samples. Upper-case tensors may be None if unused.

    The arguments by group:

    - X, DELTA: Inputs [B, T, I], and δ [B, T, O] for each draw, of a dense layer.
    - TOKENS, ROWS: Tokens [B, K], and ρ [B, K, I] for each draw, of a lookup.
    - SECOND, FOURTH: Weights [B, S] of g² (float32) and g⁴ (float64).
    - A2, A4, Q, R: Results: A2 of each part [parts, O, I], the others [O, I] in float64.
    - SUMS: Result: sums of each tile and sample [tiles, B, S (S + 1)/2 + S + 3].
    - samples, positions, lookups, outs, ins: B, T, K, O and I.
    - share: Samples of each part.
    - padding: The token whose row has no gradient.
    - x_b, ..., a_i: Strides, named after the operand and its dimension: x_b is that of X over b.
    - bucket: A key of the tuner.
    - S, DENSE, LOOKUP, DIAGONALS: The draws; whether there is a dense layer, a lookup, A4 to R.
    - WEIGHTED, QUARTIC_WEIGHTED: Whether g² and g⁴ have weights.
    - PRECISION, RAISE: Input precision of products; whether operands are converted to float32.
    - BO, BI, BT: The tile, and positions at a time.
    """
    across = tl.cdiv(ins, BI)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    o = (tile // across) * BO + tl.arange(0, BO)
    i = (tile % across) * BI + tl.arange(0, BI)
    o_in, i_in = o < outs, i < ins
    a2 = tl.zeros((BO, BI), tl.float32)
    if DIAGONALS:
        a4 = tl.zeros((BO, BI), tl.float64)
        q = tl.zeros((BO, BI), tl.float64)
        r = tl.zeros((BO, BI), tl.float64)
    COLUMNS: tl.constexpr = S * (S + 1) // 2 + S + 3
    first = part.to(tl.int64) * share
    for sample in range(tl.minimum(share, samples - part * share)):
        b = first + sample
        g = ()
        for _ in tl.static_range(S):
            g = g + (tl.zeros((BO, BI), tl.float32),)
        if DENSE:
            g = _add_positions(g, X, DELTA, b, o, i, o_in, i_in, positions,
                               x_b, x_t, x_i, d_b, d_t, d_o, S, PRECISION, RAISE, BT)  # fmt: skip
        if LOOKUP:
            g = _add_lookups(g, TOKENS, ROWS, b, o, i, i_in, lookups, padding,
                             k_b, k_t, r_b, r_t, r_i, S, PRECISION, RAISE, BT)  # fmt: skip
        scale, inverse = _power_of_two_scale(g, S)
        out = SUMS + (tile * samples + b) * COLUMNS
        f = _store_powers(g, inverse, out, SECOND, b, S, WEIGHTED, BO, BI)
        tl.store(out + COLUMNS - 1, scale)
        a2 += f * scale * scale
        if DIAGONALS:
            a4, r = _add_fourth_powers(g, a4, r, FOURTH, b, S, WEIGHTED, QUARTIC_WEIGHTED)
            wide = f.to(tl.float64) * scale.to(tl.float64) * scale.to(tl.float64)
            q += wide * wide
    place = part.to(tl.int64) * a_p + o[:, None].to(tl.int64) * a_o + i[None, :] * a_i
    inside = o_in[:, None] & i_in[None, :]
    tl.store(A2 + place, a2, mask=inside)
    if DIAGONALS:
        tl.store(A4 + place, a4, mask=inside)
        tl.store(Q + place, q, mask=inside)
        if not WEIGHTED:
            tl.store(R + place, r, mask=inside)


tuned = triton.autotune(
    CONFIGURATIONS, key=["S", "bucket", "DENSE", "LOOKUP", "DIAGONALS"], reset_to_zero=["SUMS"]
)(moments)
"""The kernel, timed once for each number of draws, type and power of two of positions."""


def launch(
    grid: Callable[[dict[str, int]], tuple[int, ...]], *arguments: Any, **constants: Any
) -> None:
    """Run the kernel: tuned on a GPU, with the smallest tiles in Triton's interpreter.

    Args:
        grid: Maps a configuration to the number of programs along each dimension.
        *arguments: The kernel's arguments up to ``bucket``.
        **constants: Its compile-time constants, except the configuration's.
    """
    if constants["RAISE"]:
        moments[grid](*arguments, **constants, **CONFIGURATIONS[-1].kwargs)
    else:
        tuned[grid](*arguments, **constants)
