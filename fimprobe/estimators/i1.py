"""Î₁, the mean outer product of scores, and its variance over labels and over inputs.

Formulas and names follow Soen & Sun (2021), eq. 3, 10, 12 and 13 (arXiv 2107.04205). The split by
the law of total variance follows Soen & Sun (2024) (arXiv 2402.05379). Symbols: B inputs, S draws or
passes, G groups of parameters; A4, Q and R are those of :class:`fimprobe.statistics.Moments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fimprobe.estimators.estimate import Estimate, make_estimates
from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.estimators.pair_variance import ROUNDING, pair_variances
from fimprobe.statistics import Moments, MomentsBatch

Value = TypeVar("Value", float, Tensor)


def label_variance(a4: Value, q: Value, r: Value, batch_size: int, draws: int | None) -> Value | None:
    """Return V̂_y, the variance of one draw's g² over labels: unbiased, mean over the inputs.

    Drawn labels: A4/(BS) − (Q − R)/(BS(S−1)); R is A4 where labels come from the model. Exact labels:
    (A4 − 3R + 2Q)/B, because fourth cumulants add up over independent labels; for one label it is
    (A4 − Q)/B.

    Args:
        a4: A4, a number or one value per entry; so are ``q`` and ``r``.
        q: Q.
        r: R.
        batch_size: B.
        draws: S; None for exact labels.

    Returns:
        The variance, in the shape of ``a4``; None for S = 1.

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
    """Return T̂, the sample variance over the inputs of a_b = Σ_s w g²/S.

    Args:
        q: Q, a number or one value per entry.
        diagonal_square: F̂_ii², in the shape of ``q``.
        batch_size: B.
        draws: S; None for exact labels.

    Returns:
        The variance, in the shape of ``q``; None for B = 1.

    >>> between_input_variance(10.0, 4.0, 2, 1)
    2.0
    """
    if batch_size < 2:
        return None
    labels = draws or 1
    return (q / labels**2 - batch_size * diagonal_square) / (batch_size - 1)


def pair_squares(q: Tensor, r: Tensor, coincidences: Tensor, draws: int) -> Tensor:
    """Return Σ_i F_i(x)² of each input from its pairs of draws, unbiased.

    Pairs of equal labels are rare and may carry most of the sum. A multiple λ of their deviation from
    the expectation is subtracted. λ depends on the other inputs only, which leaves the mean as it is.
    See docs/theory.md, "Pairs of equal labels".

    Args:
        q: Q of each input [G, B].
        r: R, in the shape of ``q``.
        coincidences: Σ_s c_s Σ_i ĝ_s⁴, in the shape of ``q``; c_s is the number of other draws equal
            to draw s, minus its expectation. Zeros where that is not known.
        draws: S ≥ 2.

    >>> q, r = torch.tensor([[2.0, 2.0, 4.0]]), torch.full((1, 3), 2.0)
    >>> pair_squares(q, r, torch.tensor([[-0.5, -0.5, 1.0]]), 2).tolist()
    [[0.125, 0.125, 0.5]]
    """
    pairs, squares = q - r, (draws - 1) * r
    of_others, largest = (x.sum(-1, keepdim=True) - x for x in (pairs, squares))
    share = torch.where(largest > 0, of_others / largest.where(largest > 0, 1), 1).clamp(0, 1)
    return (pairs - (1 - share) * coincidences) / (draws * (draws - 1))


def total_label_variance(moments: MomentsBatch, gram: Tensor) -> Tensor:
    """Return L1 = E‖g‖⁴ − ‖F‖_F² of blocks of parameters, for each input.

    Drawn labels (S ≥ 2), of ĝ = √w g, unbiased: mean_s ‖ĝ_s‖⁴/w_s − mean_{s≠t} (ĝ_s·ĝ_t)². Exact
    passes with weights w: each independent label adds its L1, and each pair of labels s ≠ t adds
    tr F_s tr F_t + tr(F_s F_t) (docs/theory.md, "Sequences").

    Args:
        moments: The moments that the Gram matrices belong to, for their weights.
        gram: Inner products of per-sample gradients [..., B, S, S].

    Returns:
        L1 of every block and input [..., B].
    """
    square = gram.square()
    diagonal = square.diagonal(dim1=-2, dim2=-1)
    if moments.draws is not None:
        draws = moments.draws
        cross = (square.sum((-2, -1)) - diagonal.sum(-1)) / (draws * (draws - 1))
        inverse = moments.inverse_weights
        fourth = diagonal if inverse is None else diagonal * inverse.cpu()
        return fourth.mean(-1) - cross
    assert moments.square_weights is not None and moments.quartic_weights is not None
    assert moments.blocks is not None
    w, w4 = moments.square_weights.double(), moments.quartic_weights.double()
    blocks = moments.blocks.to(gram.device)
    membership = torch.nn.functional.one_hot(blocks).to(w.dtype)  # [S, labels]
    same_label = membership @ membership.T
    weighted = square * w.unsqueeze(-1) * w.unsqueeze(-2)
    traces = (w * gram.diagonal(dim1=-2, dim2=-1)) @ membership
    within = (w4 * diagonal).sum(-1) - (weighted * same_label).sum((-2, -1))
    between = traces.sum(-1).square() - traces.square().sum(-1)
    return within + (between + (weighted * (1 - same_label)).sum((-2, -1)))


@dataclass(frozen=True, kw_only=True)
class InputSums:
    """Unbiased sums over the entries of every group, for each input [G, B]."""

    trace: Tensor
    """Σ_i F_i(x)."""
    fourth: Tensor
    """Σ_i E_y g_i⁴."""
    square: Tensor | None
    """Σ_i F_i(x)²; None with a single drawn label, which does not determine it."""
    error_square: Tensor | None
    """Σ_i Var F̂_i of the mean over inputs, from their variance [G]; None for one input."""
    norm_square: Tensor
    """‖diag F‖² [G], debiased: ‖diag F̂‖² − ``error_square``."""

    @classmethod
    def of(cls, moments: MomentsBatch, groups: Groups) -> InputSums:
        """Return the sums of moments of any kind of cotangents.

        Args:
            moments: The moments of the cotangents, of B inputs and S draws or passes.
            groups: The parameters of each of the G groups.
        """
        group_sums, draws = GroupSums.of(groups), moments.draws
        size, labels = moments.batch_size, draws or 1
        norms = group_sums.sum(moments.parameters, "squared_norms")
        square: Tensor | None
        a4, q, r, coincidences = group_sums.sum(moments.parameters, "powers").unbind(1)
        if draws is None:
            assert moments.square_weights is not None
            trace = (norms * moments.square_weights.double().cpu()).sum(-1)
            fourth, square = a4 - 3 * r + 3 * q, q
        else:
            trace, fourth = norms.mean(-1), a4 / draws
            square = pair_squares(q, r, coincidences, draws) if draws > 1 else None
        biased = group_sums.sum_numbers(moments.parameters, "a2_square")[0] / (size * labels) ** 2
        variance = between_input_variance(q.sum(-1), biased, size, draws)
        if variance is None:
            error, norm = None, biased if square is None else square[:, 0]
        else:
            error = variance.clamp(min=0) / size
            norm = biased - error
            norm = norm.masked_fill(norm.abs() < ROUNDING * biased, 0.0)
        return cls(trace=trace, fourth=fourth, square=square, error_square=error, norm_square=norm)


def estimate_groups(
    moments: MomentsBatch,
    groups: Groups,
    *,
    diagonals: bool,
    sums: InputSums | None = None,
    common: InputSums | None = None,
) -> dict[str, Estimate]:
    """Estimate Î₁, or another mean of g gᵀ, for each group of parameters.

    Args:
        moments: Moments of the cotangents that define the estimator.
        groups: The parameters of each group.
        diagonals: Whether to keep the diagonals and their variances.
        sums: ``InputSums.of(moments, groups)``, where they are computed already.
        common: The sums with the most reliable norm of F and variance over inputs; None for ``sums``.

    Returns:
        The estimate of each group, by its name.
    """
    size, draws = moments.batch_size, moments.draws
    sums = sums or InputSums.of(moments, groups)
    best = common or sums
    pairs = pair_variances(sums.fourth, best.square, best.trace, best.norm_square)
    gram = GroupSums.of(groups).sum_known(moments.parameters, "gram")
    total = None if gram is None else total_label_variance(moments, gram)
    total_error = None if total is None or draws is None else _standard_error(total)
    labels, label_error = None, None
    if sums.square is not None:  # one difference: fourth powers and squares of a draw are correlated
        variances = sums.fourth - sums.square
        labels = variances.mean(-1)
        label_error = None if draws is None else _standard_error(variances)
    columns = {
        "trace": sums.trace.mean(-1),
        "norm": best.norm_square.clamp(min=0).sqrt(),
        "label_variance": labels,
        "label_variance_error": label_error,
        "input_variance": None
        if best.square is None or size < 2
        else best.square.mean(-1) - best.norm_square,
        "total_variance": sums.fourth.mean(-1) - best.norm_square,
        "std_error": _standard_error(sums.trace),
        "rel_error": relative_error(sums.error_square, best.norm_square),
        "effective_inputs": effective_inputs(best.trace),
        "skewness": skewness(sums.trace),
        "total_label_variance": None if total is None else total.mean(-1),
        "total_label_variance_error": total_error,
        "pair_variance": pairs,
    }
    estimates = make_estimates(groups, columns)
    if not diagonals:
        return estimates
    return {key: estimates[key].changed(**_diagonals(moments, groups[key])) for key in groups}


def effective_inputs(trace: Tensor) -> Tensor:
    """Return (Σa)²/Σa² of the inputs' shares a of the trace [G, B]: how many inputs carry it [G].

    >>> effective_inputs(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).item()
    2.0
    """
    square = trace.square().sum(-1)
    return torch.where(square > 0, trace.sum(-1).square() / square.where(square > 0, 1), 0)


def skewness(trace: Tensor) -> Tensor | None:
    """Return the third standardised moment [G] of the inputs' shares [G, B]; None for one input.

    >>> skewness(torch.tensor([[0.0, 0.0, 0.0, 2.0]])).item()
    1.1547006368637085
    """
    if trace.shape[-1] < 2:
        return None
    centred = trace - trace.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1).sqrt()
    cube = centred.pow(3).mean(-1)
    return torch.where(deviation > 0, cube / deviation.where(deviation > 0, 1).pow(3), 0)


def relative_error(error_square: Tensor | None, norm_square: Tensor) -> Tensor | None:
    """Return the relative error √(Σ_i Var F̂_i)/‖diag F‖ of each group.

    Args:
        error_square: Σ_i Var F̂_i [G]; None for one input, which does not determine it.
        norm_square: ‖diag F‖² [G], debiased, in the same unit.

    Returns:
        The error [G] as a share of the norm; NaN where ``norm_square`` is not positive. None if
        ``error_square`` is None.
    """
    if error_square is None:
        return None
    known = norm_square > 0
    return torch.where(known, error_square / norm_square.where(known, 1), torch.nan).sqrt()


def _standard_error(values: Tensor) -> Tensor | None:
    """Return the standard error [G] of a mean over inputs [G, B]; None for one input."""
    size = values.shape[-1]
    return values.std(-1) / size**0.5 if size > 1 else None


def _diagonals(moments: MomentsBatch, names: Sequence[str]) -> dict[str, dict[str, Tensor] | None]:
    """Return the diagonals of some parameters and their variances, by the fields of ``Estimate``."""
    group = {name: moments.parameters[name] for name in names}
    count = moments.batch_size * (moments.draws or 1)
    return {
        "diagonal": {name: m.a2 / count for name, m in group.items()},
        "diagonal_label_variance": _diagonal_label_variance(moments, group),
        "diagonal_input_variance": diagonal_input_variance(moments, group),
    }


def _diagonal_label_variance(
    moments: MomentsBatch, group: Mapping[str, Moments]
) -> dict[str, Tensor] | None:
    """Return V_y of every entry; None for a single drawn label."""
    variances = {}
    for name, m in group.items():
        assert m.a4 is not None and m.q is not None and m.r is not None
        variance = label_variance(m.a4, m.q, m.r, moments.batch_size, moments.draws)
        if variance is None:
            return None
        variances[name] = variance
    return variances


def diagonal_input_variance(
    moments: MomentsBatch, group: Mapping[str, Moments]
) -> dict[str, Tensor] | None:
    """Return V_x of every entry; None for one input or a single drawn label.

    Args:
        moments: The moments of the whole measurement, for B and S.
        group: The moments of some parameters, by name.

    Returns:
        V_x of every parameter, in its shape.
    """
    if _diagonal_label_variance(moments, group) is None:
        return None
    variances = {}
    for name, m in group.items():
        assert m.q is not None
        diagonal = m.a2.double() / (moments.batch_size * (moments.draws or 1))
        across = between_input_variance(m.q, diagonal.square(), moments.batch_size, moments.draws)
        if across is None:
            return None
        variances[name] = across
        if moments.draws is not None:  # minus the part of the draws: the variance of w g², not of g²
            assert m.r is not None
            within = label_variance(m.r, m.q, m.r, moments.batch_size, moments.draws)
            assert within is not None
            variances[name] = across - within / moments.draws
    return variances
