"""Î₁, the mean outer product of scores, and its variance over labels and over inputs.

Formulas and names: Soen & Sun 2021 (arXiv 2107.04205) eq. (3), (10), (12), (13); the split by the
law of total variance: Soen & Sun 2024 (arXiv 2402.05379).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fimprobe.estimators.groups import Groups, Members
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


def total_label_variance(moments: MomentsBatch, gram: Tensor) -> Tensor:
    """L1 = E‖g‖⁴ − ‖F‖_F² of blocks, mean over inputs, from their Gram matrices [..., B, S, S].

    Sampled (S ≥ 2), unbiased: mean_s ‖g_s‖⁴ − mean_{s≠t} (g_s·g_t)². Exact passes with weights w:
    each independent label adds its own L1, and pairs of labels s ≠ t add
    tr F_s tr F_t + tr(F_s F_t) (theory §6).
    """
    square = gram.square()
    own = square.diagonal(dim1=-2, dim2=-1)
    if moments.draws is not None:
        draws = moments.draws
        cross = (square.sum((-2, -1)) - own.sum(-1)) / (draws * (draws - 1))
        return (own.mean(-1) - cross).mean(-1)
    assert moments.second is not None and moments.fourth is not None
    assert moments.blocks is not None
    w, m = moments.second.double(), moments.fourth.double()
    blocks = moments.blocks.to(gram.device)
    member = torch.nn.functional.one_hot(blocks).to(w.dtype)  # passes x blocks
    same = member @ member.T
    weighted = square * w.unsqueeze(-1) * w.unsqueeze(-2)
    trace = (w * gram.diagonal(dim1=-2, dim2=-1)) @ member
    total = (m * own).sum(-1) - (weighted * same).sum((-2, -1))
    total += trace.sum(-1).square() - trace.square().sum(-1) + (weighted * (1 - same)).sum((-2, -1))
    return total.mean(-1)


def estimate_groups(moments: MomentsBatch, groups: Groups, *, diagonals: bool) -> dict[str, Estimate]:
    """Î₁ of each group of parameters, all groups at once."""
    size, draws = moments.batch_size, moments.draws
    count = size * (draws or 1)
    members = Members(groups)
    fields = ("a2_sum", "a2_square", "a4_sum", "q_sum", "r_sum")
    a2, square, a4, q, r = members.sum_numbers(moments.parameters, *fields)
    trace, square = a2 / count, square / count**2
    labels = label_variance(a4, q, r, size, draws)
    across = spread(q, square, size, draws)
    errors = _trace_error(moments, members.sum(moments.parameters, "squared_norms"))
    grams = members.sum_known(moments.parameters, "gram")
    totals = None if grams is None else total_label_variance(moments, grams)
    inputs: Tensor | None = None
    total: Tensor | None = None
    if across is not None and labels is not None:
        inputs = across if draws is None else across - labels / draws
        total = inputs + labels
    elif draws == 1:
        total = across
    elif size == 1:
        total = labels  # one input: the labels' part is all there is to see
    error: Tensor | None = None
    if across is not None:
        error = across / size
    elif labels is not None and draws is not None:  # a single input: its draws vary
        error = labels / (size * draws)
    relative = None if error is None else (error.clamp(min=0) / square).sqrt()

    columns = (trace, square, labels, inputs, total, errors, relative, totals)
    told = [[None] * len(groups) if c is None else c.tolist() for c in columns]
    found = {}
    for (group, names), values in zip(groups.items(), zip(*told, strict=True), strict=True):
        of_trace, of_square, of_labels, of_inputs, of_both, spread_of, off, whole = values
        mine = {n: moments.parameters[n] for n in names} if diagonals else {}
        found[group] = Estimate(
            trace=of_trace,
            norm=of_square**0.5,
            label_variance=of_labels,
            input_variance=of_inputs,
            total_variance=of_both,
            std_error=spread_of,
            rel_error=off if of_square > 0 else None,
            total_label_variance=whole,
            diagonal={n: m.a2 / count for n, m in mine.items()} if diagonals else None,
            diagonal_label_variance=_diagonal_labels(moments, mine) if diagonals else None,
            diagonal_input_variance=_diagonal_inputs(moments, mine) if diagonals else None,
        )
    return found


def _trace_error(moments: MomentsBatch, norms: Tensor) -> Tensor | None:
    """Standard error of the traces [G] from ‖g_bs‖² [G, B, S]: one observation for each input."""
    if moments.draws is None:
        assert moments.second is not None
        observed = (norms * moments.second.double().cpu()).sum(-1)
    elif moments.batch_size == 1:  # one input: its draws are the observations
        observed = norms[:, 0]
    else:
        observed = norms.mean(-1)
    if observed.shape[-1] < 2:
        return None
    return observed.std(-1) / observed.shape[-1] ** 0.5


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
