"""Î₂ with its label variance from spot checks: the same F, and no diagonal of R.

V2 is known by group only, with its own standard error. ‖R‖² of whole blocks needs directions, which
are there where bounds were measured. Symbols as in :mod:`fimprobe.estimators.i2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fimprobe.estimators.estimate import Estimate, make_estimates
from fimprobe.estimators.groups import Groups
from fimprobe.estimators.i1 import (
    InputSums,
    effective_inputs,
    relative_error,
    skewness,
)
from fimprobe.estimators.i2 import diagonal_of, fisher_part, total_label_variance_error
from fimprobe.estimators.pair_variance import PairVariance, pair_variances
from fimprobe.estimators.spot_checks import CheckedVariance, estimate_v2, spreads_of_kinds
from fimprobe.statistics import Measured

NO_BLOCKS = "spot checks measure diagonals; reports with bounds=True measure whole blocks as well"
"""Why the sum over all pairs of entries is unknown."""

NO_ENTRIES = "spot checks measure sums over entries; pass second_order={'probes': 2} for each of them"
"""Why the label variance of single entries is unknown."""


_OF_V2 = ("label_variance", "label_variance_error", "total_variance", "pairs")
_OF_BLOCKS = ("total_label_variance", "total_label_variance_error")


def estimate_groups(
    measured: Measured,
    groups: Groups,
    common: InputSums,
    grams: Tensor | None,
    *,
    diagonals: bool,
) -> dict[str, Estimate]:
    """Estimate Î₂ for each group of parameters.

    Args:
        measured: The statistics of the batch, with spot checks.
        groups: The parameters of each group.
        common: The sums with the most reliable norm of F and variance over inputs.
        grams: The Gram matrices of R; None where they were not measured.
        diagonals: Whether to keep the diagonal of F.

    Returns:
        The estimate of each group, by its name.
    """
    assert measured.spot_checks is not None
    fisher = fisher_part(measured)
    size = fisher.batch_size
    sums = InputSums.of(fisher, groups)
    checks = measured.spot_checks
    spreads = spreads_of_kinds(checks)
    checked = [estimate_v2(checks, names, spreads) for names in groups.values()]
    unsplit = common.square is None or size < 2
    columns: dict[str, Tensor | Sequence[Any] | None] = {
        "trace": sums.trace.mean(-1),
        "norm": common.norm_square.clamp(min=0).sqrt(),
        "input_variance": None
        if common.square is None or unsplit
        else common.square.mean(-1) - common.norm_square,
        "std_error": sums.trace.std(-1) / size**0.5 if size > 1 else None,
        "rel_error": relative_error(sums.error_square, common.norm_square),
        "effective_inputs": effective_inputs(common.trace),
        "skewness": skewness(sums.trace),
    }
    if grams is not None:
        curvature = measured.curvature
        assert curvature is not None
        blocks = diagonal_of(grams)[..., : curvature.draws].contiguous()
        total = (blocks * curvature.weights).sum(-1)  # [J, G, B]
        columns["total_label_variance"] = total.mean((0, -1))
        columns["total_label_variance_error"] = total_label_variance_error(total, curvature.exact)
    columns["pair_variance"] = _pair_variances(common, checked)
    of_inputs: list[float | None] = [None] * len(groups)
    if common.square is not None:
        of_inputs = (common.square.mean(-1) - common.norm_square).tolist()
    estimates = make_estimates(groups, columns)
    for (group, names), of_group, variance in zip(groups.items(), checked, of_inputs, strict=True):
        estimates[group] = estimates[group].changed(
            **_of_checks(of_group, variance),
            **(_diagonals(measured, names) if diagonals else {}),
            unknown=_unknown(of_group, blocks=grams is not None, diagonals=diagonals),
        )
    return estimates


def _of_checks(checked: CheckedVariance, of_inputs: float | None) -> dict[str, Any]:
    """The fields that V2 determines, with the variance over inputs where it is known."""
    if checked.value is None:
        return {}
    total = None if of_inputs is None else of_inputs + checked.value
    return {
        "label_variance": checked.value,
        "label_variance_error": checked.error,
        "total_variance": total,
    }


def _pair_variances(common: InputSums, checked: list[CheckedVariance]) -> list[PairVariance | None]:
    """The moments behind the errors of Î₂, with the error of V2; None where V2 is unknown."""
    if common.square is None:
        return [None] * len(checked)
    v2 = common.square.new_tensor([c.value or 0.0 for c in checked]).unsqueeze(-1)
    pairs = pair_variances(common.square + v2, common.square, common.trace, common.norm_square)
    result: list[PairVariance | None] = []
    for pair, c in zip(pairs, checked, strict=True):
        (first, *others), *rows = pair.covariance
        covariance = ((first + c.error**2, *others), *rows)
        result.append(None if c.value is None else replace(pair, covariance=covariance))
    return result


def _unknown(checked: CheckedVariance, *, blocks: bool, diagonals: bool) -> dict[str, str]:
    """Why fields are None, by their names."""
    unknown: dict[str, str] = {}
    if checked.value is None:
        unknown |= dict.fromkeys(_OF_V2, checked.reason)
    if not blocks:
        unknown |= dict.fromkeys(_OF_BLOCKS, NO_BLOCKS)
    if diagonals:
        unknown["diagonal_label_variance"] = NO_ENTRIES
    return unknown


def _diagonals(measured: Measured, names: Any) -> dict[str, Any]:
    """The diagonal of F of some parameters."""
    fisher = fisher_part(measured)
    exact = measured.moments["i1"].draws is None
    count = fisher.batch_size * (1 if exact else (fisher.draws or 1))
    return {"diagonal": {name: fisher.parameters[name].a2.double() / count for name in names}}
