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
            f"Not twice differentiable: {'; '.join(report.kinks)}. Î₂ stays unbiased, since no input "
            "lies exactly on a kink, but it sees no curvature at the kinks."
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
    pairs = report.batch_size * (report.draws or 1)
    drawn = "exact labels" if report.draws is None else f"{pairs} (input, label) pairs"
    if need is not None and total.rel_error is not None:
        cause = ", from the choice of inputs alone" if report.draws is None else ""
        unit = "pairs of an input and a drawn label" if report.draws is None else "such pairs"
        lines.append(
            f"Î₁ of the whole model is off by {percent(total.rel_error)} at {report.batch_size} "
            f"inputs with {drawn}{cause}; 10 % takes {count(need)} {unit}."
        )
    worst = max(
        ((g.i1.draws_for(0.1) or 0.0, n) for n, g in report.layers.items() if g.i1.norm > 0),
        default=(0.0, ""),
    )
    if worst[0] > 0 and len(report.layers) > 1:
        lines.append(f"The layer that needs most is {worst[1]!r}: {count(worst[0])} pairs.")
    return lines


def _choice(report: Report) -> list[str]:
    """Which estimator, by layer, at equal compute."""
    cost = cost_ratio(report)
    if cost is None:
        return []
    wins: dict[str, list[str]] = {"i1": [], "i2": []}
    lines, known = [], False
    for name, group in report.layers.items():
        found = better_estimator(group, cost)
        known = known or found is not None
        if found is not None and found[1] >= CLEAR:
            gain = "no error" if found[1] == float("inf") else f"{found[1]:.2g}× less error"
            wins[found[0]].append(f"{name!r} ({gain})")
    price = f"at equal compute (a diagonal of Î₂ costs {cost:.2g} times one of Î₁ here)"
    parts = [
        f"{label} in {_some(wins[kind])}"
        for kind, label in (("i2", "Î₂"), ("i1", "Î₁"))
        if wins[kind]
    ]
    if parts:
        lines.append(f"More accurate {price}: {'; '.join(parts)}.")
    elif known:
        lines.append(f"Î₁ and Î₂ err alike {price}.")
    silent = [n for n, g in report.layers.items() if g.i2 is not None and g.i2.label_variance == 0]
    if silent:
        lines.append(
            f"Labels add no variance to the diagonal of Î₂ in {_some([repr(n) for n in silent])}."
        )
    return lines


def _labels(report: Report) -> list[str]:
    labels, inputs = report.total.i1.label_variance, report.total.i1.input_variance
    if labels is None or inputs is None or report.draws is None:
        return []
    labels, inputs = max(labels, 0.0), max(inputs, 0.0)  # estimates: noise takes them below 0
    if labels + inputs == 0:
        return []
    best = max((labels / inputs) ** 0.5, 1.0) if inputs > 0 else float("inf")
    side = (
        "drawing more labels for each input helps"
        if best > 2 * report.draws
        else "take more inputs rather than more labels for each"
    )
    number_of = f" ({best:.2g} labels for each are best where both cost the same)"
    return [
        f"Drawn labels cause {100 * labels / (labels + inputs):.0f} % of the variance of one (input, "
        f"label) pair; {side}{number_of if inputs > 0 else ''}."
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
    told = ", ".join(f"{n!r} (s_max {number(s)})" for s, n in large)
    bound = report.layers[first].geometry
    assert bound is not None
    slack = ""
    if bound.jacobian_spectral_norm and bound.spectral_bound:
        ratio = bound.spectral_bound / bound.jacobian_spectral_norm
        slack = f" ({number(ratio)} times the true value at {first!r})"
    return [
        f"The bound (21) on s_max(∂h/∂W) of the layers before{slack} grows with the weights of "
        f"{told}; fimprobe.penalties.spectral(model) penalises them."
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
