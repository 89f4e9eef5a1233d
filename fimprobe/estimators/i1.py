"""Î₁, the mean outer product of scores, and its variance over labels and over inputs.

Formulas and names: Soen & Sun 2021 (arXiv 2107.04205) eq. (3), (10), (12), (13); the split by the
law of total variance: Soen & Sun 2024 (arXiv 2402.05379).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fimprobe.types import Estimate, Moments, MomentsBatch

Value = TypeVar("Value", float, Tensor)


def label_variance(a4: Value, q: Value, r: Value, batch_size: int, draws: int | None) -> Value | None:
    """V̂_y, the variance of one draw's g² over labels, unbiased, averaged over inputs.

    Sampled: A4/(BS) − (Q − A4)/(BS(S−1)), None for S = 1. Exact (``draws=None``), by the additivity
    of fourth cumulants over independent labels: (A4 − 3R + 2Q)/B, which is (A4 − Q)/B for one label.

    >>> label_variance(10.0, 12.0, 12.0, 2, 2)
    2.0
    """
    if draws is None:
        return (a4 - 3 * r + 2 * q) / batch_size
    if draws < 2:
        return None
    return a4 / (batch_size * draws) - (q - a4) / (batch_size * draws * (draws - 1))


def spread(q: Value, diagonal_square: Value, batch_size: int, draws: int | None) -> Value | None:
    """T̂, the sample variance over inputs of a_b = Σ_s g²/S: Q/S² and F̂² give it. None for B = 1.

    >>> spread(10.0, 4.0, 2, 1)
    2.0
    """
    if batch_size < 2:
        return None
    count = draws or 1
    return (q / count**2 - batch_size * diagonal_square) / (batch_size - 1)


def total_label_variance(moments: MomentsBatch, gram: Tensor) -> float | None:
    """L1 = E‖g‖⁴ − ‖F‖_F² of a block, mean over inputs, from the Gram matrices [B, S, S].

    Sampled (S ≥ 2), unbiased: mean_s ‖g_s‖⁴ − mean_{s≠t} (g_s·g_t)². Exact passes with weights w:
    each independent label adds its own L1, and pairs of labels s ≠ t add
    tr F_s tr F_t + tr(F_s F_t) (theory §6).
    """
    square = gram.square()
    own = square.diagonal(dim1=1, dim2=2)
    if moments.draws is not None:
        draws = moments.draws
        cross = (square.sum((1, 2)) - own.sum(1)) / (draws * (draws - 1))
        return float((own.mean(1) - cross).mean())
    assert moments.second is not None and moments.fourth is not None
    assert moments.blocks is not None
    w, m = moments.second.double(), moments.fourth.double()
    blocks = moments.blocks.to(gram.device)
    same = blocks[:, None] == blocks[None, :]
    weighted = square * w[:, :, None] * w[:, None, :]
    trace = torch.zeros(len(w), int(blocks.max()) + 1, dtype=w.dtype, device=w.device)
    trace.index_add_(1, blocks, w * gram.diagonal(dim1=1, dim2=2))
    total = (m * own).sum(1) - (weighted * same).sum((1, 2))
    total += trace.sum(1).square() - trace.square().sum(1) + (weighted * ~same).sum((1, 2))
    return float(total.mean())


def estimate(moments: MomentsBatch, names: list[str], *, diagonals: bool) -> Estimate:
    """Î₁ of the group of parameters ``names``."""
    group = {name: moments.parameters[name] for name in names}
    size, draws = moments.batch_size, moments.draws
    count = size * (draws or 1)
    trace = sum(m.a2_sum for m in group.values()) / count
    square = sum(m.a2_square for m in group.values()) / count**2
    a4, q, r = (sum(getattr(m, k) for m in group.values()) for k in ("a4_sum", "q_sum", "r_sum"))
    labels = label_variance(a4, q, r, size, draws)
    across = spread(q, square, size, draws)
    inputs = total = None
    if across is not None and draws is None:
        inputs = across
    elif across is not None and draws is not None and labels is not None:
        inputs = across - labels / draws
    if inputs is not None and labels is not None:
        total = inputs + labels
    elif draws == 1:
        total = across
    elif size == 1:
        total = labels  # one input: the labels' part is all there is to see
    norms = sum_tensors([m.squared_norms for m in group.values()])
    error = _error_of_mean(across, labels, size, draws)
    return Estimate(
        trace=trace,
        norm=square**0.5,
        label_variance=labels,
        input_variance=inputs,
        total_variance=total,
        std_error=_trace_error(moments, norms),
        rel_error=None if error is None or square == 0 else (max(error, 0.0) / square) ** 0.5,
        total_label_variance=_total(moments, group),
        diagonal={n: m.a2 / count for n, m in group.items()} if diagonals else None,
        diagonal_label_variance=_diagonal_labels(moments, group) if diagonals else None,
        diagonal_input_variance=_diagonal_inputs(moments, group) if diagonals else None,
    )


def sum_tensors(tensors: list[Tensor]) -> Tensor:
    """Σ of equally shaped tensors."""
    return torch.stack(tensors).sum(0)


def _error_of_mean(
    across: float | None, labels: float | None, size: int, draws: int | None
) -> float | None:
    """Σ_i Var F̂_ii: over inputs and draws; for a single input over its draws."""
    if across is not None:
        return across / size
    if labels is not None and draws is not None:
        return labels / (size * draws)
    return None


def _trace_error(moments: MomentsBatch, norms: Tensor) -> float | None:
    """Standard error of the trace: each input's Σ_s ‖g_s‖²/S is one observation."""
    if moments.draws is None:
        assert moments.second is not None
        per_input = (norms * moments.second.double()).sum(1)
    else:
        per_input = norms.mean(1)
        if len(per_input) == 1:  # one input: its draws are the observations
            per_input = norms[0]
    if len(per_input) < 2:
        return None
    return float(per_input.std() / len(per_input) ** 0.5)


def _total(moments: MomentsBatch, group: Mapping[str, Moments]) -> float | None:
    grams = [m.gram for m in group.values() if m.gram is not None]
    if len(grams) < len(group):
        return None
    return total_label_variance(moments, sum_tensors(grams))


def _diagonal_labels(moments: MomentsBatch, group: Mapping[str, Moments]) -> dict[str, Tensor] | None:
    found = {}
    for name, m in group.items():
        assert m.a4 is not None and m.q is not None and m.r is not None
        value = label_variance(m.a4, m.q, m.r, moments.batch_size, moments.draws)
        if value is None:
            return None
        found[name] = value
    return found


def _diagonal_inputs(moments: MomentsBatch, group: Mapping[str, Moments]) -> dict[str, Tensor] | None:
    labels = _diagonal_labels(moments, group)
    if labels is None:
        return None
    found = {}
    for name, m in group.items():
        assert m.q is not None
        diagonal = m.a2.double() / (moments.batch_size * (moments.draws or 1))
        across = spread(m.q, diagonal.square(), moments.batch_size, moments.draws)
        if across is None:
            return None
        found[name] = across if moments.draws is None else across - labels[name] / moments.draws
    return found
