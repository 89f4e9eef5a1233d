"""The advice of a report: what its numbers mean and what to do, in sentences that contain them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS
from fimprobe.report.error_advice import error_sentences, is_of_error
from fimprobe.report.estimator_choice import MAX_NAMES, MIN_GAIN, choice_sentences
from fimprobe.report.format import listed, number, percent, quantity, some
from fimprobe.report.record import FROZEN

if TYPE_CHECKING:
    from fimprobe.report.report import Report

LEFT_OUT = "left out: "
"""Start of the coverage of a parameter that was not measured."""


def make_advice(report: Report) -> list[str]:
    """Return the sentences, the most useful ones first."""
    return [
        *error_sentences(report),
        *choice_sentences(report),
        *_label_sentences(report),
        *_weight_sentences(report),
        *_violation_sentences(report),
        *_probe_sentences(report),
        *[note for note in report.notes if not is_of_error(note)],
        *_coverage_sentences(report),
    ]


def _label_sentences(report: Report) -> list[str]:
    """Return the share of the labels in the variance of Î₁, and what lowers its error."""
    estimate = report.total.i1
    labels, inputs = estimate.label_variance, estimate.input_variance
    if labels is None or inputs is None or labels + inputs <= 0:
        return []
    share = labels / (labels + inputs)
    sentence = (
        f"Labels cause {_format_share(share)} of the variance of Î₁ from one (input, label) pair"
    )
    if share < 0.5:
        return [f"{sentence}: more inputs lower its error, more labels for each of them do little."]
    sentence += ": more labels for each input lower its error, exact ones most"
    sentence += _size_biased_clause(report)
    others = [SYMBOLS[key] for key in ("i2", "ih") if _needs_far_fewer_pairs(report, key)]
    if others:
        verb = "has" if len(others) == 1 else "have"
        sentence += f"; {listed(others)} {verb} a smaller error with as many pairs"
    return [f"{sentence}."]


def _size_biased_clause(report: Report) -> str:
    """Return the gain of size-biased labels in this report, or a hint to use them."""
    estimate = report.total.i1
    if report.label_sampling == "model":
        return ", and so do size-biased ones where the model is confident"
    if report.label_sampling != "size_biased" or report.draws is None:
        return ""
    with_model_labels = estimate.error_of(inputs=report.batch_size, labels=report.draws)
    if estimate.rel_error is None or with_model_labels is None:
        return ""
    if estimate.rel_error >= with_model_labels / MIN_GAIN:
        return ""
    return (
        f"; with the size-biased labels of this report its error is {percent(estimate.rel_error)}, "
        f"with as many from the model it would be {percent(with_model_labels)}"
    )


def _format_share(x: float) -> str:
    """Return a share in percent that is not rounded to all or nothing."""
    if not 0 < x < 1:
        return "all" if x >= 1 else "none"
    if not 0.001 <= x <= 0.999:
        return "over 99.9 %" if x > 0.5 else "under 0.1 %"
    return f"{100 * x:.0f} %" if 0.01 <= x <= 0.99 else f"{100 * x:.3g} %"


def _needs_far_fewer_pairs(report: Report, key: str) -> bool:
    """Return whether an estimator needs less than a quarter of the pairs of Î₁."""
    other = report.total.get(key)
    i1_pairs = report.total.i1.pairs_for(0.1)
    pairs = None if other is None else other.pairs_for(0.1)
    return i1_pairs is not None and pairs is not None and pairs < i1_pairs / 4


def _weight_sentences(report: Report) -> list[str]:
    """Return the layers whose weights make the bounds (20), (21) large."""
    norms = {
        name: group.geometry.weight_spectral_norm
        for name, group in report.layers.items()
        if group.geometry is not None
        and group.geometry.weight_spectral_norm is not None
        and group.geometry.spectral_bound is not None
    }
    if len(norms) < 2:
        return []
    first = next(iter(norms))  # its own weights do not enter the bounds of the layers after it
    later = {name: norm for name, norm in norms.items() if name != first}
    large = sorted(((norm, name) for name, norm in later.items() if norm > 1), reverse=True)[:3]
    if not large:
        return []
    layers = ", ".join(f"{name!r} ({number(norm)})" for norm, name in large)
    geometry = report.layers[first].geometry
    assert geometry is not None
    slack = ""
    if geometry.jacobian_spectral_norm and geometry.spectral_bound:
        ratio = geometry.spectral_bound / geometry.jacobian_spectral_norm
        slack = f" ({number(ratio)} times the true value at {first!r})"
    return [
        f"The bound on the Jacobian of earlier layers{slack} grows with the spectral norm of each "
        f"weight: {layers}. fimprobe.penalties.spectral(model) penalises them."
    ]


def _violation_sentences(report: Report) -> list[str]:
    """Return the measured values above their bounds: a defect of fimprobe, to be reported."""
    groups = {**report.parameters, **report.layers, "the model": report.total}
    violations = []
    for name, group in groups.items():
        for key in LAYER_KEYS:
            estimate = group.get(key)
            if estimate is not None and _violates_bound(estimate, key, report.batch_size):
                norm = f"covariance norm of {SYMBOLS[key]} {number(estimate.covariance_norm)}"
                violations.append(f"{name} ({norm}, bound {number(estimate.bound)})")
    if not violations:
        return []
    return [
        f"VIOLATED BOUND in {some(violations, MAX_NAMES)}: this is a defect of fimprobe; please "
        "report it with the model."
    ]


def _violates_bound(estimate: Estimate, key: str, batch_size: int) -> bool:
    """Return whether the norm of the covariance is above its bound by more than noise explains."""
    norm, bound = estimate.covariance_norm, estimate.bound
    if norm is None or bound is None:
        return False
    limit = max(bound + 4 * (estimate.bound_error or 0.0), estimate.sharp_bound or 0.0)
    if key == "i1":
        # near even odds of two labels E‖g‖⁴ − ‖F‖² cancels to the rounding of its terms
        rounding = 1e-5 * batch_size * (estimate.trace or 0.0) ** 2
        return norm > 1.001 * limit + rounding
    # Î₂'s norm never exceeds the sharp bound of the same probes, but their noise can make (18) of a
    # block negative: only a gross excess is reported
    return norm > 2.0 * limit


def _probe_sentences(report: Report) -> list[str]:
    """Return where the random probes are what makes Î₂'s label variance uncertain."""
    estimate = report.total.i2
    if estimate is None:
        return []
    hidden = [
        repr(name) for name, group in report.layers.items() if group.i2 and _lost_to_probes(group.i2)
    ]
    if _lost_to_probes(estimate):
        hidden.insert(0, "the whole model")
    effects = []
    variance, error = estimate.label_variance, estimate.label_variance_error
    if variance and estimate.probe_error and error and error >= 0.25 * variance:
        effects.append(f"make Î₂'s label variance uncertain by {percent(error / variance)}")
    if hidden:
        noun = "that" if effects else "Î₂'s label variance"
        effects.append(f"hide {noun} of {some(hidden, MAX_NAMES)}")
    if not effects:
        return []
    return [
        f"Random probes {' and '.join(effects)}; second_order={{'probes': K}} with a larger K lowers "
        "their noise as 1/√K."
    ]


def _lost_to_probes(estimate: Estimate) -> bool:
    """Return whether the label variance is lost in noise that comes mostly from the probes."""
    error = estimate.label_variance_error
    if estimate.label_variance is not None or not estimate.probe_error or error is None:
        return False
    return estimate.probe_error**2 >= error**2 / 2


def _coverage_sentences(report: Report) -> list[str]:
    """Return the modules with kinks, and the parameters that were not measured."""
    sentences = []
    if report.kinks:
        sentences.append(
            f"Not twice differentiable: {'; '.join(report.kinks)}. Î₂ stays unbiased, since no input "
            "lies exactly on a kink, but it sees no curvature at the kinks."
        )
    left_out = [
        f"{name} ({coverage.removeprefix(LEFT_OUT)})"
        for name, coverage in report.coverage.items()
        if coverage.startswith(LEFT_OUT) and coverage != FROZEN
    ]
    if left_out:
        sentences.append(f"Left out: {some(left_out, MAX_NAMES)}.")
    frozen = list(report.coverage.values()).count(FROZEN)
    if frozen:
        verb = "is" if frozen == 1 else "are"
        sentences.append(f"{quantity(frozen, 'parameter tensor')} {verb} frozen and not measured.")
    return sentences
