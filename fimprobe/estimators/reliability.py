"""Reliability checks: unreliable numbers of an estimate become None, with the reason.

A sample does not show what it misses: labels that were never drawn, and inputs that carry F but are
not in the batch. The signs of both are checked here, in one place for all outputs.
"""

from __future__ import annotations

import math
from typing import Any

from fimprobe.estimators.bulk import record_of
from fimprobe.estimators.estimate import NUMBERS, Estimate, are_finite

MIN_EFFECTIVE_INPUTS = 5
"""Number of effective inputs below which no error is reported."""
FEW_EFFECTIVE_INPUTS = 10
"""Number of effective inputs below which no error is reported if they are less than ``HEAVY_TAIL`` of
the inputs. Then few of many inputs carry F, and similar ones are likely missing from the batch.
Measured on digits trained to confidence (as in tests/integration/test_error_bars.py): trace ± 2
standard errors covered the truth in 25 to 87 % of the samples of 32 inputs with 5 to 8 effective
ones, in 93 % of the samples with more."""
HEAVY_TAIL = 0.25
HEAVY_TAIL_OF_SQUARES = 0.05
"""The same share for the squares of F, which variances come from. Measured on a tanh network whose
inputs have log-normal sizes (sigma 1.5), two labels from 50 classes: with 2 to 8 effective inputs
of 128 or 512, variances were up to 30 of their standard errors too low; with 20 or more, 2.5."""

MIN_SEEN_MASS, MAX_SEEN_MASS = 0.5, 2.0
"""Range of ``seen_mass`` in which labels drawn from the model carry enough of the expected score."""

MAX_JOINT_ERRORS = 4
"""Number of joint standard errors by which two estimates of one trace may differ."""

ROUNDING = 1e-6
"""Relative difference of two exact traces that is rounding."""

_ERRORS = ("std_error", "rel_error", "pairs")
_LABELS = (
    "label_variance",
    "label_variance_error",
    "total_variance",
    "total_label_variance",
    "total_label_variance_error",
)
_DIAGONALS = ("diagonal", "diagonal_label_variance", "diagonal_input_variance")
_ALL = ("trace", "norm", "input_variance", "effective_inputs", *_LABELS, *_ERRORS, *_DIAGONALS)
_NEEDS_TWO_LABELS = ("label_variance", "input_variance", "total_variance", "total_label_variance")
_SINGLE = "one label for each input does not separate labels from inputs; take draws=2"
_ZERO = "zero to rounding"
_NOT_FINITE = "not a finite number: gradients at these inputs, or their powers, leave float64's range"
_NO_GRAM = "inner products of draws are kept up to 16 draws or passes only"
_BOUNDS = ("bound", "sharp_bound", "trace_bound")
_NOISY_BOUNDS = (*_BOUNDS, "diagonal_bound", "covariance_norm")
_BELOW = "its noise puts it below the value that it bounds"


def seen_mass_reason(seen_mass: float | None, *, size_biased: bool = False) -> str:
    """Return why labels drawn from the model miss F; empty where they do not.

    Args:
        seen_mass: Σ‖δ‖² of the drawn labels over its expectation; None where all labels are seen.
        size_biased: Whether size-biased labels were requested.

    >>> seen_mass_reason(0.017)[:62]
    'the drawn labels carry 1.7 % of the expected score; pass label'
    """
    if seen_mass is None or MIN_SEEN_MASS <= seen_mass <= MAX_SEEN_MASS:
        return ""
    share = f"{100 * seen_mass:.2g} % of" if seen_mass < 1 else f"{seen_mass:.2g} times"
    remedy = "label_sampling='size_biased' or draws='exact'"
    if size_biased:  # the family cannot draw them
        remedy = "draws='exact', or a likelihood whose probabilities reach further"
    return f"the drawn labels carry {share} the expected score; pass {remedy}"


def disagreement_reason(
    one: Estimate | None, other: Estimate | None, *, plain_labels: bool = False
) -> str:
    """Return why the traces of Î₁ and Î₂, which estimate the same F, contradict each other; else "".

    For labels drawn from the model two joint standard errors and a factor of two are enough. In a
    single layer labels that carry F may be missing, which the variance of the others does not show.

    Args:
        one: Î₁.
        other: Î₂.
        plain_labels: Whether labels were drawn from the model with equal weights.
    """
    if one is None or other is None or one.trace is None or other.trace is None:
        return ""
    if one.std_error is None or other.std_error is None:
        return ""
    joint = (one.std_error**2 + other.std_error**2) ** 0.5
    difference = abs(one.trace - other.trace)
    limit = 2 if plain_labels and one.trace < 0.5 * other.trace else MAX_JOINT_ERRORS
    # exact zeros differ by rounding only
    if difference <= limit * joint + ROUNDING * abs(one.trace) or joint == 0:
        return ""
    return (
        f"the traces of Î₁ and Î₂ estimate the same F and differ by {difference / joint:.2g} joint "
        "standard errors; take more inputs, or draws='exact'"
    )


def widening(skewness: float, batch_size: int) -> float:
    """Return the factor on 2 standard errors with which an interval covers 95 %.

    To second order the coverage of mean ± z s.e. is below the normal one by
    2φ(z) z (γ²(z⁴ + 2z² − 3)/18 + (z² + 3)/4)/B. Here γ is the skewness, and the term of the kurtosis
    is left out. Widening z by this amount over 2φ(z) compensates for it. See Hall (1992), The
    Bootstrap and Edgeworth Expansion, section 3.5 (two-sided t intervals).

    Args:
        skewness: γ of the inputs' shares of the trace.
        batch_size: B.

    >>> round(widening(0.0, 1000), 4), round(widening(2.0, 32), 2)
    (1.0017, 1.2)
    """
    return 1 + (7 / 6 * skewness**2 + 7 / 4) / batch_size


def withhold(
    estimate: Estimate,
    *,
    batch_size: int,
    exact_labels: bool = False,
    single_label: bool = False,
    labels_unseen: str = "",
    only_labels: bool = False,
    disagreement: str = "",
    non_negative: bool = False,
) -> Estimate:
    """Return the estimate without its unreliable numbers.

    Args:
        estimate: The estimate as measured.
        batch_size: B.
        exact_labels: Whether labels were integrated over, so that their part has no noise.
        single_label: Whether one label was drawn for each input.
        labels_unseen: Why the drawn labels miss F; empty where they do not.
        only_labels: Whether F was estimated without labels (Î₂), so that only the variances over
            labels are unreliable where ``labels_unseen``.
        disagreement: Why the errors of the estimate cannot be right; empty where they can.
        non_negative: Whether the label variance is a mean of values that are never negative, which
            shows its size at any error.

    Returns:
        The estimate, with None for each unreliable number and its reason in ``unknown``.
    """
    unseen = (*_LABELS, *_ERRORS) if only_labels else _ALL
    reasons = dict.fromkeys(unseen if labels_unseen else (), labels_unseen)
    few = _few_inputs(estimate, batch_size)
    for reason in (disagreement, few):
        if reason:
            reasons = dict.fromkeys(_ERRORS, reason) | reasons
    if batch_size == 1 and estimate.input_variance is None:
        reasons = {"input_variance": "one input has no variance over inputs"} | reasons
    no_gram = estimate.total_label_variance is None and estimate.label_variance is not None
    if no_gram and "total_label_variance" not in estimate.unknown:
        reasons = {"total_label_variance": _NO_GRAM} | reasons
    if estimate.trace is None and "trace" not in reasons:
        reasons = dict.fromkeys(_ALL, _NOT_FINITE) | reasons
    if single_label:
        missing = [n for n in _NEEDS_TWO_LABELS if getattr(estimate, n) is None]
        if estimate.pair_variance is None:
            missing += ["pairs"]
        reasons = dict.fromkeys(missing, _SINGLE) | reasons
    if not exact_labels:
        reasons = _few_squares(estimate, batch_size, non_negative) | reasons
    reasons = _lost_in_noise(estimate, exact_labels, non_negative) | reasons
    values = vars(estimate).copy()
    for name in ("norm", "std_error", "rel_error"):
        if values[name] is None:
            reasons.setdefault(name, _NOT_FINITE)
    if estimate.std_error is not None and estimate.skewness is not None:
        values["std_error"] = estimate.std_error * widening(estimate.skewness, batch_size)
    return _without(estimate, values, reasons)


def _few_inputs(e: Estimate, batch_size: int) -> str:
    """Return why the inputs are too few for an error; empty where they are enough."""
    effective = e.effective_inputs
    if batch_size < MIN_EFFECTIVE_INPUTS:
        count = "one input is" if batch_size == 1 else f"{batch_size} inputs are"
        return f"{count} too few for an error; take {MIN_EFFECTIVE_INPUTS} or more"
    if effective is None:
        return ""
    if effective == 0:
        return "no gradient reaches it at these inputs"
    heavy = effective < FEW_EFFECTIVE_INPUTS and effective < HEAVY_TAIL * batch_size
    if effective < MIN_EFFECTIVE_INPUTS - 1e-3 or heavy:
        numbers = f"({effective:.2g} of {batch_size})"
        return f"too few inputs have a gradient that counts {numbers}; take more inputs"
    return ""


def _few_squares(e: Estimate, batch_size: int, non_negative: bool) -> dict[str, str]:
    """Return why variances are unknown where few inputs carry the squares of F.

    Squares are spread more widely than F. Where the drawn labels of the few largest inputs miss what
    counts, the spread over inputs does not show it.

    Args:
        e: The estimate.
        batch_size: B.
        non_negative: As for ``withhold``.
    """
    effective = float("inf") if e.pair_variance is None else e.pair_variance.effective_inputs
    if effective >= min(FEW_EFFECTIVE_INPUTS, HEAVY_TAIL_OF_SQUARES * batch_size):
        return {}
    reason = f"too few inputs carry it ({effective:.2g} of {batch_size}); take more inputs"
    names = ["input_variance", "pairs", *([] if non_negative else ["label_variance"])]
    return dict.fromkeys(names, reason)


def _lost_in_noise(e: Estimate, exact_labels: bool, non_negative: bool) -> dict[str, str]:
    """Return why fields are unknown by one rule: a value below twice its own error is noise."""
    reasons = _noisy_variances(e, exact_labels) | _noisy_bounds(e)
    if non_negative:
        reasons.pop("label_variance", None)
    if e.covariance_norm == 0 and e.total_label_variance and e.probe_error is not None:
        reasons["covariance_norm"] = "lost in the noise of random probes; take more of them"
    if e.norm == 0 and e.trace:
        norm_reason = "the norm of F is lost in its noise"
        reasons |= dict.fromkeys(("norm", "rel_error", "pairs"), norm_reason)
    elif e.pair_variance is not None and e.relative_variance(1) is None:
        variance = e.pair_variance.relative(1)
        numbers = ""
        if variance is not None:
            numbers = f" ({variance[0]:.3g} ± {variance[1]:.3g} times ‖diag F‖²)"
        reasons["pairs"] = f"the variance of a pair is lost in its noise{numbers}; take more inputs"
    return reasons


def _noisy_variances(e: Estimate, exact_labels: bool) -> dict[str, str]:
    """Return why the variances over labels and inputs are unknown."""
    reasons = {}
    for name, value, error in (
        ("label_variance", e.label_variance, e.label_variance_error),
        ("total_label_variance", e.total_label_variance, e.total_label_variance_error),
    ):
        if value is not None and _is_noise(value, error):
            reasons[name] = _noise_reason(value, error)
    if e.pair_variance is None or e.input_variance is None or e.trace == 0:
        return reasons
    relative = e.pair_variance.relative(None)
    if relative is None:
        reasons["input_variance"] = _noise_reason(e.input_variance, None)
        return reasons
    variance, error = relative
    if variance < 0 or (not exact_labels and variance < 2 * error):
        reasons["input_variance"] = _noise_reason(
            e.input_variance, error * e.pair_variance.norm_square
        )
    elif e.input_variance < 0:  # rounding
        reasons["input_variance"] = _ZERO
    return reasons


def _noisy_bounds(e: Estimate) -> dict[str, str]:
    """Return why the bounds, and the covariance's norm next to them, are unknown."""
    values = vars(e)
    known = {name: value for name in _NOISY_BOUNDS if (value := values[name]) is not None}
    reasons: dict[str, str] = {}
    if not known:
        return reasons
    bounds = [name for name in _BOUNDS if name in known]
    if e.bound is not None and _is_noise(e.bound, e.bound_error):
        reasons = dict.fromkeys(bounds, _noise_reason(e.bound, e.bound_error))
    elif e.trace_bound is not None and e.total_label_variance is not None:
        relative_error = (e.bound_error or 0.0) / e.bound if e.bound else 0.0
        slack = 2 * (relative_error * e.trace_bound + (e.total_label_variance_error or 0.0))
        # a larger excess is a violated bound, which the advice reports
        if 0 < e.total_label_variance - e.trace_bound < slack:
            reasons = dict.fromkeys(bounds, _BELOW)
    reasons |= {name: _noise_reason(value, None) for name, value in known.items() if value < 0}
    if (
        e.diagonal_bound is not None
        and e.label_variance is not None
        and e.bound_error is not None
        and e.diagonal_bound < e.label_variance
    ):
        reasons["diagonal_bound"] = _BELOW
    return reasons


def _is_noise(value: float, error: float | None) -> bool:
    """Return whether a non-negative quantity is below zero or below twice its error."""
    return value < 0 or (error is not None and value < 2 * error)


def _noise_reason(value: float, error: float | None) -> str:
    numbers = f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.3g}"
    return f"lost in its noise ({numbers}); take more inputs"


def _without(estimate: Estimate, values: dict[str, Any], reasons: dict[str, str]) -> Estimate:
    """Return the estimate with other values of its fields, None for each that has a reason."""
    infinite: list[str] = []
    if not are_finite(estimate):
        infinite = [n for n in NUMBERS if not math.isfinite(getattr(estimate, n) or 0.0)]
    if estimate.pair_variance is not None and not estimate.pair_variance.is_finite():
        infinite.append("pairs")
    if infinite:
        reasons = dict.fromkeys(infinite, _NOT_FINITE) | reasons
    for name in reasons:
        values["pair_variance" if name == "pairs" else name] = None
    if estimate.total_variance is not None and estimate.total_variance < 0:  # rounding, or lost
        values["total_variance"] = 0.0
    if "pairs" in reasons:
        reasons = {"total_variance": reasons["pairs"], **reasons}
        values["total_variance"] = None
    if reasons.get("input_variance") == _ZERO:
        values["input_variance"] = 0.0
        del reasons["input_variance"]
    values["unknown"] = {**estimate.unknown, **reasons}
    return record_of(Estimate, values)
