"""Î₁, the mean outer product of scores, and its variance over labels and over inputs.

Formulas and names: Soen & Sun 2021 (arXiv 2107.04205) eq. (3), (10), (12), (13); the split by the
law of total variance: Soen & Sun 2024 (arXiv 2402.05379).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.estimators.pair_variance import ROUNDING, pair_variances
from fimprobe.statistics import Moments, MomentsBatch

Value = TypeVar("Value", float, Tensor)


def label_variance(a4: Value, q: Value, r: Value, batch_size: int, draws: int | None) -> Value | None:
    """V̂_y, the variance of one draw's g² over labels, unbiased, averaged over inputs.

    Drawn: A4/(BS) − (Q − R)/(BS(S−1)), None for S = 1; R is A4 where labels come from the model.
    Exact (``draws=None``), by the additivity of fourth cumulants over independent labels:
    (A4 − 3R + 2Q)/B, which is (A4 − Q)/B for one label.

    >>> label_variance(10.0, 12.0, 10.0, 2, 2)
    2.0
    """
    if draws is None:
        return (a4 - 3 * r + 2 * q) / batch_size
    if draws < 2:
        return None
    return a4 / (batch_size * draws) - (q - r) / (batch_size * draws * (draws - 1))


def between_input_variance(
    q: Value, diagonal_square: Value, batch_size: int, draws: int | None
) -> Value | None:
    """T̂, the sample variance over inputs of a_b = Σ_s w g²/S: Q/S² and F̂² give it. None for B = 1.

    >>> between_input_variance(10.0, 4.0, 2, 1)
    2.0
    """
    if batch_size < 2:
        return None
    count = draws or 1
    return (q / count**2 - batch_size * diagonal_square) / (batch_size - 1)


def total_label_variance(moments: MomentsBatch, gram: Tensor) -> Tensor:
    """L1 = E‖g‖⁴ − ‖F‖_F² of blocks, for each input [..., B], from Gram matrices [..., B, S, S].

    Drawn (S ≥ 2), of ĝ = √w g, unbiased: mean_s ‖ĝ_s‖⁴/w_s − mean_{s≠t} (ĝ_s·ĝ_t)². Exact passes with
    weights w: each independent label adds its own L1, and pairs of labels s ≠ t add
    tr F_s tr F_t + tr(F_s F_t) (docs/theory.md, "Sequences").
    """
    square = gram.square()
    own = square.diagonal(dim1=-2, dim2=-1)
    if moments.draws is not None:
        draws = moments.draws
        cross = (square.sum((-2, -1)) - own.sum(-1)) / (draws * (draws - 1))
        fourth = own if moments.inverse_weights is None else own * moments.inverse_weights.cpu()
        return fourth.mean(-1) - cross
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
    return total


@dataclass(frozen=True, kw_only=True)
class InputSums:
    """Of every group and input [G, B], summed over the group's entries; unbiased."""

    trace: Tensor
    """Σ_i F_i(x)."""
    fourth: Tensor
    """Σ_i E_y g_i⁴."""
    square: Tensor | None
    """Σ_i F_i(x)²; None where one label for each input cannot tell."""
    error_square: Tensor | None
    """Σ_i Var F̂_i of the mean over inputs, from their spread [G]; None for one input."""
    norm_square: Tensor
    """‖diag F‖² [G], debiased: ‖diag F̂‖² − ``error_square``."""

    @classmethod
    def of(cls, moments: MomentsBatch, groups: Groups) -> InputSums:
        """From the moments of any kind of cotangents."""
        members, draws = GroupSums(groups), moments.draws
        size, count = moments.batch_size, draws or 1
        norms = members.sum(moments.parameters, "squared_norms")
        square: Tensor | None
        a4, q, r, _ = members.sum(moments.parameters, "powers").unbind(1)
        if draws is None:
            assert moments.second is not None
            trace = (norms * moments.second.double().cpu()).sum(-1)
            fourth, square = a4 - 3 * r + 3 * q, q
        else:
            trace, fourth = norms.mean(-1), a4 / draws
            square = (q - r) / (draws * (draws - 1)) if draws > 1 else None
        whole = members.sum_numbers(moments.parameters, "a2_square")[0] / (size * count) ** 2
        across = between_input_variance(q.sum(-1), whole, size, draws)
        if across is None:
            alone = whole if square is None else square[:, 0]
            return cls(
                trace=trace, fourth=fourth, square=square, error_square=None, norm_square=alone
            )
        error = across.clamp(min=0) / size
        norm = whole - error
        norm = norm.masked_fill(norm.abs() < ROUNDING * whole, 0.0)
        return cls(
            trace=trace,
            fourth=fourth,
            square=square,
            error_square=error,
            norm_square=norm,
        )


def estimate_groups(
    moments: MomentsBatch,
    groups: Groups,
    *,
    diagonals: bool,
    sums: InputSums | None = None,
    common: InputSums | None = None,
) -> dict[str, Estimate]:
    """Î₁, or another mean of g gᵀ, of each group of parameters, all groups at once.

    Args:
        moments: of the cotangents that the estimator is made of.
        groups: the parameters of each group.
        diagonals: keep the diagonals and their variances.
        sums: of these moments and groups, where they are known already.
        common: the sums that tell F's variance over inputs and its norm best, where these are others.
    """
    size, draws = moments.batch_size, moments.draws
    count = size * (draws or 1)
    sums = sums or InputSums.of(moments, groups)
    best = common or sums
    pairs = pair_variances(sums.fourth, best.square, best.trace, best.norm_square)
    gram = GroupSums(groups).sum_known(moments.parameters, "gram")
    whole = None if gram is None else total_label_variance(moments, gram)
    errors = None if whole is None or draws is None else _mean_error(whole)
    labels, label_errors = None, None
    if sums.square is not None:  # the same draws' fourth powers and squares vary together
        each = sums.fourth - sums.square
        labels, label_errors = each.mean(-1), None if draws is None else _mean_error(each)
    columns = {
        "trace": sums.trace.mean(-1),
        "norm": best.norm_square.clamp(min=0).sqrt(),
        "label_variance": labels,
        "label_variance_error": label_errors,
        "input_variance": None
        if best.square is None or size < 2
        else best.square.mean(-1) - best.norm_square,
        "total_variance": sums.fourth.mean(-1) - best.norm_square,
        "std_error": _mean_error(sums.trace),
        "rel_error": relative_error(sums.error_square, best.norm_square),
        "effective_inputs": effective_inputs(best.trace),
        "skewness": skewness(sums.trace),
        "total_label_variance": None if whole is None else whole.mean(-1),
        "total_label_variance_error": errors,
    }
    values = {n: [None] * len(groups) if c is None else c.tolist() for n, c in columns.items()}
    found = {}
    for row, (group, names) in enumerate(groups.items()):
        mine = {n: moments.parameters[n] for n in names} if diagonals else {}
        found[group] = Estimate(
            **row_of(values, row),
            pair_variance=pairs[row],
            diagonal={n: m.a2 / count for n, m in mine.items()} if diagonals else None,
            diagonal_label_variance=_diagonal_labels(moments, mine) if diagonals else None,
            diagonal_input_variance=diagonal_inputs(moments, mine) if diagonals else None,
        )
    return found


def effective_inputs(trace: Tensor) -> Tensor:
    """(Σa)²/Σa² of the inputs' shares of the trace [G, B]: how many inputs it comes from.

    >>> effective_inputs(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).item()
    2.0
    """
    square = trace.square().sum(-1)
    return torch.where(square > 0, trace.sum(-1).square() / square.where(square > 0, 1), 0)


def skewness(trace: Tensor) -> Tensor | None:
    """The third standardised moment of the inputs' shares [G, B]; None for one input.

    >>> skewness(torch.tensor([[0.0, 0.0, 0.0, 2.0]])).item()
    1.1547006368637085
    """
    if trace.shape[-1] < 2:
        return None
    centred = trace - trace.mean(-1, keepdim=True)
    spread = centred.square().mean(-1).sqrt()
    cube = centred.pow(3).mean(-1)
    return torch.where(spread > 0, cube / spread.where(spread > 0, 1).pow(3), 0)


def relative_error(error_square: Tensor | None, norm_square: Tensor) -> Tensor | None:
    """√(Σ_i Var F̂_i)/‖diag F‖ [G]; NaN where noise is all that is left of the norm."""
    if error_square is None:
        return None
    known = norm_square > 0
    return torch.where(known, error_square / norm_square.where(known, 1), torch.nan).sqrt()


def _mean_error(each: Tensor) -> Tensor | None:
    """Standard error [G] of a mean over inputs [G, B]."""
    size = each.shape[-1]
    return each.std(-1) / size**0.5 if size > 1 else None


def row_of(values: Mapping[str, Sequence[float | None]], row: int) -> dict[str, Any]:
    """One group's values, None in place of NaN."""
    column = {name: of[row] for name, of in values.items()}
    return {name: None if x is None or x != x else x for name, x in column.items()}


def _diagonal_labels(moments: MomentsBatch, group: Mapping[str, Moments]) -> dict[str, Tensor] | None:
    found = {}
    for name, m in group.items():
        assert m.a4 is not None and m.q is not None and m.r is not None
        value = label_variance(m.a4, m.q, m.r, moments.batch_size, moments.draws)
        if value is None:
            return None
        found[name] = value
    return found


def diagonal_inputs(moments: MomentsBatch, group: Mapping[str, Moments]) -> dict[str, Tensor] | None:
    """V_x of every entry; None for one input or a single drawn label."""
    labels = _diagonal_labels(moments, group)
    if labels is None:
        return None
    found = {}
    for name, m in group.items():
        assert m.q is not None
        diagonal = m.a2.double() / (moments.batch_size * (moments.draws or 1))
        across = between_input_variance(m.q, diagonal.square(), moments.batch_size, moments.draws)
        if across is None:
            return None
        found[name] = across
        if moments.draws is not None:  # less what the draws vary by: that of w g², not of g²
            assert m.r is not None
            within = label_variance(m.r, m.q, m.r, moments.batch_size, moments.draws)
            assert within is not None
            found[name] = across - within / moments.draws
    return found
