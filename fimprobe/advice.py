"""What a report's numbers say, and what to do about it, in sentences with the numbers in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fimprobe.table import count, number, percent
from fimprobe.types import Estimate, GroupEstimates

if TYPE_CHECKING:
    from fimprobe.report import Report

CLEAR = 1.1
"""Estimators whose errors differ by less are called equal."""


def make_advice(report: Report) -> list[str]:
    """The sentences, the most useful first."""
    lines = [*_errors(report), *_choice(report), *_labels(report), *_weights(report)]
    lines += [*_violations(report), *_probes(report), *report.notes]
    if report.kinks:
        lines.append(
            "Î₂ needs twice differentiable activations; at generic parameters it stays unbiased for "
            f"the ones with kinks here ({'; '.join(report.kinks)}), but sees no curvature there."
        )
    left = [f"{n} ({why[10:]})" for n, why in report.coverage.items() if why.startswith("left")]
    if left:
        lines.append(f"Left out: {_some(left)}.")
    return lines


def cost_ratio(report: Report) -> float | None:
    """Measured cost of one (input, label) pair for diag Î₂ over that for Î₁, at this size."""
    parts = report.seconds_by_part
    if not {"forward", "i1", "i2 diagonal"} <= set(parts):
        return None
    return (parts["forward"] + parts["i2 diagonal"]) / (parts["forward"] + parts["i1"])


def better_estimator(group: GroupEstimates, cost: float) -> tuple[str, float] | None:
    """The better of i1 and i2 at equal compute, and the other one's error over its own.

    Errors go as √(variance of a pair × its cost).
    """
    first, second = group.i1, group.i2
    if second is None or first.total_variance is None or second.total_variance is None:
        return None
    ours, theirs = max(first.total_variance, 0.0), max(second.total_variance, 0.0) * cost
    if ours == 0 and theirs == 0:
        return None
    if theirs <= ours:
        return "i2", (ours / theirs) ** 0.5 if theirs > 0 else float("inf")
    return "i1", (theirs / ours) ** 0.5 if ours > 0 else float("inf")


def _errors(report: Report) -> list[str]:
    lines = []
    total = report.total.i1
    need = total.draws_for(0.1)
    drawn = "exact labels" if report.draws is None else f"{report.batch_size * report.draws} draws"
    if need is not None and total.rel_error is not None:
        cause = " by the choice of inputs alone" if report.draws is None else ""
        lines.append(
            f"Î₁ of the whole model is off by {percent(total.rel_error)}{cause} at "
            f"{report.batch_size} inputs with {drawn}; 10 % takes {count(need)} (input, label) "
            "pairs."
        )
    worst = max(
        ((g.i1.draws_for(0.1) or 0.0, n) for n, g in report.layers.items() if g.i1.norm > 0),
        default=(0.0, ""),
    )
    if worst[0] > 0 and len(report.layers) > 1:
        lines.append(f"The layer that needs most is {worst[1]}: {count(worst[0])} pairs.")
    return lines


def _choice(report: Report) -> list[str]:
    """Which estimator, by layer, at equal compute."""
    cost = cost_ratio(report)
    if cost is None:
        return []
    wins: dict[str, list[str]] = {"i1": [], "i2": []}
    for name, group in report.layers.items():
        found = better_estimator(group, cost)
        if found is not None and found[1] >= CLEAR:
            gain = "∞" if found[1] == float("inf") else f"{found[1]:.2g}"
            wins[found[0]].append(f"{name} ({gain}×)")
    price = f"(one diagonal of Î₂ costs {cost:.2g} times one of Î₁ here)"
    if wins["i2"] and not wins["i1"]:
        lines = [f"Use Î₂: less error at equal compute {price} in {_some(wins['i2'])}."]
    elif wins["i1"] and not wins["i2"]:
        lines = [f"Use Î₁: less error at equal compute {price} in {_some(wins['i1'])}."]
    elif wins["i1"]:
        lines = [
            f"Use Î₂ in {_some(wins['i2'])} and Î₁ in {_some(wins['i1'])}: less error at equal "
            f"compute {price}."
        ]
    else:
        lines = [f"Î₁ and Î₂ err alike at equal compute {price}."] if report.total.i2 else []
    silent = [n for n, g in report.layers.items() if g.i2 is not None and g.i2.label_variance == 0]
    if silent:
        lines.append(f"Î₂ is exact in the labels (zero variance) in {_some(silent)}.")
    return lines


def _labels(report: Report) -> list[str]:
    labels, inputs = report.total.i1.label_variance, report.total.i1.input_variance
    if labels is None or inputs is None or inputs <= 0 or report.draws is None:
        return []
    best = (labels / inputs) ** 0.5
    side = (
        "more labels for each input help"
        if best > 2 * report.draws
        else "more inputs help, not more labels"
    )
    return [
        f"Labels cause {labels / (labels + inputs):.0%} of the variance of one pair; {side} "
        f"(best number of labels for an input at equal cost: {max(best, 1):.2g})."
    ]


def _weights(report: Report) -> list[str]:
    """The layers whose weights make the bounds (20), (21) large."""
    norms = {
        name: g.geometry.weight_spectral_norm
        for name, g in report.layers.items()
        if g.geometry is not None
        and g.geometry.weight_spectral_norm is not None
        and g.geometry.spectral_bound is not None
    }
    if len(norms) < 2:
        return []
    first = next(iter(norms))  # its own weights do not enter the bounds of the layers after it
    after = {n: s for n, s in norms.items() if n != first}
    large = sorted(((s, n) for n, s in after.items() if s > 1), reverse=True)[:3]
    if not large:
        return []
    told = ", ".join(f"{n} (s_max {number(s)})" for s, n in large)
    bound = report.layers[first].geometry
    assert bound is not None
    slack = ""
    if bound.jacobian_spectral_norm and bound.spectral_bound:
        ratio = bound.spectral_bound / bound.jacobian_spectral_norm
        slack = f", which is {number(ratio)} times the true ‖∂h/∂W‖ at {first}"
    return [
        f"The bound (21) on the variance grows with the weights of {told}{slack}; "
        "fimprobe.penalties.spectral(model) penalises them."
    ]


def _violations(report: Report) -> list[str]:
    """Measured values above their bounds: an error of ours, to be reported."""
    found = []
    for name, group in {**report.parameters, **report.layers, "the model": report.total}.items():
        for kind in ("i1", "i2"):
            e: Estimate | None = getattr(group, kind)
            if e is None:
                continue
            value, bound = e.covariance_norm, e.bound
            slack = 4 * (e.bound_error or 0.0)
            # norms from probed Gram matrices are themselves estimates: only gross ones are told
            factor = 1.001 if kind == "i1" else 2.0
            if value is not None and bound is not None and value > factor * (bound + slack) > 0:
                found.append(f"{name} ({kind}: {number(value)} > {number(bound)})")
    if not found:
        return []
    return [f"VIOLATED BOUND in {_some(found)}: this cannot be; please report it with the model."]


def _probes(report: Report) -> list[str]:
    e = report.total.i2
    if e is None or not e.probe_error or not e.label_variance:
        return []
    share = e.probe_error / abs(e.label_variance)
    if share < 0.25:
        return []
    return [
        f"Random probes add {percent(share)} of noise to Î₂'s label variance; "
        "second_order={'probes': K} with a larger K lowers it as 1/√K."
    ]


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
