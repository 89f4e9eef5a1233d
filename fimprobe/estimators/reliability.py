"""Which numbers of an estimate can be believed; the others become None, with the reason.

A sample holds no trace of what it misses: labels that were never drawn, inputs that carry F and were
not among the batch. What tells of them is checked here, in one place for all outputs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fimprobe.estimators.estimate import Estimate

MIN_EFFECTIVE_INPUTS = 5
"""Below so many effective inputs no error is claimed."""
FEW_EFFECTIVE_INPUTS = 10
"""Below so many none is claimed where they are less than ``HEAVY_TAIL`` of the inputs: then few of
many inputs carry F, and others like them are likely not among the batch. Measured on digits trained
to confidence (as in tests/test_error_bars.py): trace ± 2 standard errors covered the truth in 25 to
87 % of the samples of 32 inputs with 5 to 8 effective ones, in 93 % of those above."""
HEAVY_TAIL = 0.25

MIN_SEEN_MASS, MAX_SEEN_MASS = 0.5, 2.0
"""Between them, labels drawn from the model carry enough of the expected score."""

JOINT_ERRORS = 4
"""Two estimates of one trace may differ by so many joint standard errors."""

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
_OF_TWO_LABELS = ("label_variance", "input_variance", "total_variance", "total_label_variance")
_SINGLE = "one label for each input does not tell labels from inputs; take draws=2"
_ZERO = "zero to rounding"
_NOT_FINITE = "not a finite number: gradients at these inputs, or their powers, leave float64's range"
_NO_GRAM = "inner products of draws are kept up to 16 draws or passes only"
_BOUNDS = ("bound", "sharp_bound", "trace_bound")


def seen_mass_reason(seen_mass: float | None, *, size_biased: bool = False) -> str:
    """Why labels drawn from the model tell nothing; empty where they do.

    >>> seen_mass_reason(0.017)[:62]
    'the drawn labels carry 1.7 % of the expected score; pass label'
    """
    if seen_mass is None or MIN_SEEN_MASS <= seen_mass <= MAX_SEEN_MASS:
        return ""
    share = f"{100 * seen_mass:.2g} % of" if seen_mass < 1 else f"{seen_mass:.2g} times"
    remedy = "label_sampling='size_biased' or draws='exact'"
    if size_biased:  # the family could not
        remedy = "draws='exact', or a likelihood whose probabilities reach further"
    return f"the drawn labels carry {share} the expected score; pass {remedy}"


def disagreement_reason(
    one: Estimate | None, other: Estimate | None, *, plain_labels: bool = False
) -> str:
    """Why the traces of Î₁ and Î₂, which estimate the same F, cannot both be right; else empty.

    Of ``plain_labels``, drawn from the model, two joint standard errors and a factor of two are
    enough: in a single layer labels that carry F may be missing, and their own spread does not tell.
    """
    if one is None or other is None or one.trace is None or other.trace is None:
        return ""
    errors = (one.std_error, other.std_error)
    if errors[0] is None or errors[1] is None:
        return ""
    joint = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    difference = abs(one.trace - other.trace)
    # exact zeros differ by rounding only
    limit = JOINT_ERRORS
    if plain_labels and one.trace < 0.5 * other.trace:
        limit = 2
    if difference <= limit * joint + 1e-6 * abs(one.trace) or joint == 0:
        return ""
    return (
        f"the traces of Î₁ and Î₂ estimate the same F and differ by {difference / joint:.2g} joint "
        "standard errors; take more inputs, or draws='exact'"
    )


def widening(skewness: float, batch_size: int) -> float:
    """How much wider than 2 standard errors an interval has to be to cover 95 %.

    To second order the coverage of mean ± z s.e. falls short of the normal one by
    2φ(z) z (γ²(z⁴ + 2z² − 3)/18 + (z² + 3)/4)/B, γ the skewness and the kurtosis' share left out;
    widening z by the same amount over 2φ(z) makes up for it.
    Source: Hall (1992), The Bootstrap and Edgeworth Expansion, section 3.5 (two-sided t intervals).

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
) -> Estimate:
    """The estimate without the numbers that cannot be believed.

    Args:
        estimate: as measured.
        batch_size: B.
        exact_labels: labels were integrated over, so that the inputs' part has no noise.
        single_label: one label was drawn for each input.
        labels_unseen: why the drawn labels tell nothing.
        only_labels: F itself was not made of labels (Î₂): only what they vary by is withheld.
        disagreement: why its errors cannot be right.
    """
    reasons: dict[str, str] = {}
    if labels_unseen:
        names = (*_LABELS, *_ERRORS) if only_labels else _ALL
        reasons |= dict.fromkeys(names, labels_unseen)
    few = _few_inputs(estimate, batch_size)
    for reason in (disagreement, few):
        if reason:
            reasons = dict.fromkeys(_ERRORS, reason) | reasons
    if batch_size == 1 and estimate.input_variance is None:
        reasons = {"input_variance": "one input has no variance over inputs"} | reasons
    if estimate.total_label_variance is None and estimate.label_variance is not None:
        reasons = {"total_label_variance": _NO_GRAM} | reasons
    if estimate.trace is None and "trace" not in reasons:
        reasons = dict.fromkeys(_ALL, _NOT_FINITE) | reasons
    if single_label:
        missing = [n for n in _OF_TWO_LABELS if getattr(estimate, n) is None]
        if estimate.pair_variance is None:
            missing += ["pairs"]
        reasons = dict.fromkeys(missing, _SINGLE) | reasons
    reasons = _lost_in_noise(estimate, exact_labels) | reasons
    for name in ("norm", "std_error", "rel_error"):
        if getattr(estimate, name) is None:
            reasons.setdefault(name, _NOT_FINITE)
    changes: dict[str, Any] = {}
    if estimate.std_error is not None and estimate.skewness is not None:
        changes["std_error"] = estimate.std_error * widening(estimate.skewness, batch_size)
    return _without(estimate, changes, reasons)


def _few_inputs(e: Estimate, batch_size: int) -> str:
    effective = e.effective_inputs
    if batch_size < MIN_EFFECTIVE_INPUTS:
        count = "one input is" if batch_size == 1 else f"{batch_size} inputs are"
        return f"{count} too few to tell an error; take {MIN_EFFECTIVE_INPUTS} or more"
    if effective is None:
        return ""
    if effective == 0:
        return "no gradient reaches it at these inputs"
    heavy = effective < FEW_EFFECTIVE_INPUTS and effective < HEAVY_TAIL * batch_size
    if effective < MIN_EFFECTIVE_INPUTS - 1e-3 or heavy:
        return f"too few inputs carry the trace ({effective:.2g} of {batch_size}); take more inputs"
    return ""


def _lost_in_noise(e: Estimate, exact_labels: bool) -> dict[str, str]:
    """One rule: below twice its own error a variance, norm, bound or L is not known."""
    found = {}

    def lost(value: float | None, error: float | None) -> bool:
        return value is not None and (value < 0 or (error is not None and value < 2 * error))

    def noise(value: float | None, error: float | None) -> str:
        told = f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.3g}"
        return f"lost in its noise ({told}); take more inputs"

    for name in ("label_variance", "total_label_variance"):
        value, error = getattr(e, name), getattr(e, f"{name}_error")
        if lost(value, error):
            found[name] = noise(value, error)
    if e.pair_variance is not None and e.input_variance is not None and e.trace != 0:
        inputs = e.pair_variance.relative(None)
        scale = e.pair_variance.norm_square
        if inputs is None or (not exact_labels and inputs[0] < 2 * inputs[1]) or inputs[0] < 0:
            error = None if inputs is None else inputs[1] * scale
            found["input_variance"] = noise(e.input_variance, error)
        elif e.input_variance < 0:  # rounding
            found["input_variance"] = _ZERO
    if lost(e.bound, e.bound_error):
        found |= {n: noise(e.bound, e.bound_error) for n in _BOUNDS if getattr(e, n) is not None}
    elif e.trace_bound is not None and e.total_label_variance is not None:
        relative = (e.bound_error or 0.0) / e.bound if e.bound else 0.0
        slack = 2 * (relative * e.trace_bound + (e.total_label_variance_error or 0.0))
        if e.total_label_variance > e.trace_bound and e.total_label_variance - e.trace_bound < slack:
            reason = "its noise takes it below what it bounds"
            found |= {n: reason for n in _BOUNDS if getattr(e, n) is not None}
    for name in (*_BOUNDS, "diagonal_bound", "covariance_norm"):
        value = getattr(e, name)
        if value is not None and value < 0:
            found[name] = noise(value, None)
    if (
        e.diagonal_bound is not None
        and e.label_variance is not None
        and e.bound_error is not None
        and e.diagonal_bound < e.label_variance
    ):
        found["diagonal_bound"] = "its noise takes it below what it bounds"
    if e.covariance_norm == 0 and e.total_label_variance and e.probe_error is not None:
        found["covariance_norm"] = "lost in the noise of random probes; take more of them"
    if e.norm == 0 and e.trace:
        found |= dict.fromkeys(("norm", "rel_error", "pairs"), "the norm of F is lost in its noise")
    elif e.pair_variance is not None and e._relative(1) is None:
        value = e.pair_variance.relative(1)
        told = "" if value is None else f" ({value[0]:.3g} ± {value[1]:.3g} times ‖diag F‖²)"
        found["pairs"] = f"the variance of a pair is lost in its noise{told}; take more inputs"
    return found


def _without(estimate: Estimate, changes: dict[str, Any], reasons: dict[str, str]) -> Estimate:
    """The estimate with ``changes``, and None for what has a reason."""
    wild = [n for n, x in vars(estimate).items() if isinstance(x, float) and not math.isfinite(x)]
    if estimate.pair_variance is not None and not estimate.pair_variance.is_finite():
        wild.append("pairs")
    reasons = dict.fromkeys(wild, _NOT_FINITE) | reasons
    changes |= {name: None for name in reasons if name != "pairs"}
    if estimate.total_variance is not None and estimate.total_variance < 0:  # rounding, or lost
        changes["total_variance"] = 0.0
    if "pairs" in reasons:
        reasons = {"total_variance": reasons["pairs"], **reasons}
        changes |= {"pair_variance": None, "total_variance": None}
    if reasons.get("input_variance") == _ZERO:
        changes["input_variance"] = 0.0
        reasons = {n: r for n, r in reasons.items() if n != "input_variance"}
    if not changes:
        return estimate
    return replace(estimate, **changes, unknown={**estimate.unknown, **reasons})
