"""What a report's numbers say, and what to do about it, in sentences with the numbers in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fimprobe.table import count, number, percent
from fimprobe.types import Estimate, GroupEstimates

if TYPE_CHECKING:
    from fimprobe.report import Report

CLEAR = 1.1
"""Estimators whose errors differ by less are called equal."""

NAMES = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H"}


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


def costs(report: Report) -> dict[str, float]:
    """Seconds that this measurement took for the diagonal of each estimator, all pairs together.

    All share the forward pass. Î₂ = F − R takes F as well: from Hutchinson's seeds, or from Î₁'s
    passes where labels are exact.
    """
    parts = report.seconds_by_part
    fisher = "i1" if report.draws is None else "ggn" if "ggn" in parts else "ih"
    needs = {"i1": ["i1"], "i2": [fisher, "i2 diagonal"], "ih": ["ih"]}
    return {
        kind: sum(parts[n] for n in ("forward", *names))
        for kind, names in needs.items()
        if {"forward", *names} <= set(parts)
    }


def best_estimator(group: GroupEstimates, seconds: dict[str, float]) -> tuple[str, float] | None:
    """The estimator with the least error at equal compute, and the next best one's error over its.

    Errors go as √(variance of a pair × its cost). None unless two are known, one above zero, and
    where two standard errors of the probes of Î₂'s variance could turn the choice.
    """
    low, high = {}, {}
    for kind, cost in seconds.items():
        estimate: Estimate | None = getattr(group, kind)
        if estimate is not None and estimate.total_variance is not None:
            noise = 2 * (estimate.probe_error or 0.0)
            low[kind] = (max(estimate.total_variance - noise, 0.0) * cost) ** 0.5
            high[kind] = (max(estimate.total_variance, 0.0) + noise) ** 0.5 * cost**0.5
    if len(low) < 2 or not any(high.values()):
        return None
    first = min(high, key=lambda kind: high[kind])
    second = min(low[kind] for kind in low if kind != first)
    if second < high[first]:
        return None
    if second == 0:
        return first, 1.0
    return first, second / high[first] if high[first] > 0 else float("inf")


def _errors(report: Report) -> list[str]:
    lines = []
    total = report.total.i1
    if total.norm == 0:
        return [_zero(report)]
    need = total.draws_for(0.1)
    if need is not None and total.rel_error is not None:
        pairs = f"an error of 10 % takes {count(need)} (input, label) pairs"
        size = _plural(report.batch_size, "input")
        if report.draws is None:
            others = [(k, getattr(report.total, k)) for k in ("i1", "i2", "ih")]
            off = " and ".join(
                f"{percent(report.one_label_error(e))} ({NAMES[kind]})"
                for kind, e in others
                if e is not None and e.draws_for(0.1) is not None
            )
            lines.append(
                f"F of the whole model is off by {percent(total.rel_error)} at {size} with labels "
                "integrated over: from the choice of inputs alone. With one drawn label for each "
                f"input it is off by {off}; {pairs} with Î₁."
            )
        else:
            how = f"{size} with {_plural(report.draws, 'drawn label')} each"
            how += f" ({_plural(report.batch_size * report.draws, 'pair')})"
            if report.batch_size == 1:
                how += ", seen at that input alone"
            lines.append(
                f"Î₁ of the whole model is off by {percent(total.rel_error)} at {how}; {pairs}."
            )
    groups = [(n, g) for n, g in report.layers.items() if g.i1.norm > 0]
    worst = max(((g.i1.draws_for(0.1) or 0.0, n) for n, g in groups), default=(0.0, ""))
    if worst[0] > 0 and len(report.layers) > 1:
        lines.append(
            f"The layer that needs most for 10 % is {worst[1]!r}: {count(worst[0])} (input, label) "
            "pairs."
        )
    dead = [repr(n) for n, g in report.layers.items() if g.i1.norm == 0]
    if dead:
        lines.append(
            f"No gradient reaches {_some(dead)} at these inputs: its Fisher information is zero."
        )
    return lines


def _zero(report: Report) -> str:
    if report.draws is None:
        return (
            "Î₁ of the whole model is zero, whatever the label: the outputs are saturated, or mask= "
            "leaves no label."
        )
    return (
        "Î₁ of the whole model is zero: none of the drawn labels has a gradient. The outputs are "
        "saturated (draws='exact' sees the labels that are never drawn), or mask= leaves no label."
    )


def _choice(report: Report) -> list[str]:
    """Which estimator, by layer, at equal compute."""
    if report.total.i1.norm == 0:
        return []
    seconds = costs(report)
    wins: dict[str, list[str]] = {kind: [] for kind in ("i2", "ih", "i1")}
    lines, known = [], False
    for name, group in report.layers.items():
        found = best_estimator(group, seconds)
        known = known or found is not None
        if found is not None and found[1] >= CLEAR:
            gain = "no error seen" if found[1] == float("inf") else f"{found[1]:.2g}×"
            wins[found[0]].append(f"{name!r} ({gain})")
    others = [k for k in ("i2", "ih") if k in seconds and getattr(report.total, k) is not None]
    told = " and ".join(
        f"by {NAMES[k]} takes {seconds[k] / seconds['i1']:.2g}" for k in others if known
    )
    timed = f"Timed here: a diagonal {told} times as long as by Î₁."
    same = "For the same computing time"
    parts = [f"{NAMES[kind]} in {_some(names)}" for kind, names in wins.items() if names]
    if parts:
        than = "the other" if len(others) == 1 else "the next best"
        least = "; ".join(parts).replace(" in ", " errs least in ", 1)
        lines.append(f"{same} {least}. In brackets: how many times less than {than}. {timed}")
    elif known:
        labels = ["Î₁", *(NAMES[k] for k in others)]
        lines.append(f"{same} {' and '.join(labels)} err alike. {timed}")
    silent = [
        repr(n)
        for n, g in report.layers.items()
        if g.i2 is not None and g.i2.label_variance == 0 and g.i1.norm > 0
    ]
    if silent:
        lines.append(
            f"Labels add no variance to the diagonal of Î₂ in {_some(silent)}: it equals that of F."
        )
    return lines


def _labels(report: Report) -> list[str]:
    """Where the variance comes from, and S* = √(V_y/V_x) labels for each input."""
    labels, inputs = report.total.i1.label_variance, report.total.i1.input_variance
    if labels is None or inputs is None or report.draws is None or report.total.i1.norm == 0:
        return []
    labels, inputs = max(labels, 0.0), max(inputs, 0.0)  # estimates: noise takes them below 0
    if labels + inputs == 0:
        return []
    share = f"Drawn labels cause {100 * labels / (labels + inputs):.0f} % of the variance of one pair"
    if inputs == 0:
        return [f"{share}: more labels for each input (draws=) help as much as more inputs."]
    best = max((labels / inputs) ** 0.5, 1.0)
    if best > 1.5 * report.draws:
        do = f"draws={count(best)} is best"
    elif report.draws > 1.5 * best:
        do = f"draws={count(best)} with more inputs is best"
    else:
        do = f"draws={report.draws} is near the best, and more inputs lower the error"
    return [f"{share}. Where an input costs as much as a label, {do}."]


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
    found: list[str] = []
    for name, group in {**report.parameters, **report.layers, "the model": report.total}.items():
        for kind in ("i1", "i2"):
            e: Estimate | None = getattr(group, kind)
            if e is None:
                continue
            value, bound = e.covariance_norm, e.bound
            if value is None or bound is None:
                continue
            # Î₂'s norm never exceeds the sharp bound of the same probes, but their noise takes (18)
            # of a block below zero: only gross excess is told there
            limit = max(bound + 4 * (e.bound_error or 0.0), e.sharp_bound or 0.0)
            factor = 1.001 if kind == "i1" else 2.0
            # near even odds of two labels little is left of E‖g‖⁴ - ‖F‖²: digits of the former
            rounding = 1e-5 * report.batch_size * e.trace**2 if kind == "i1" else 0.0
            if value > factor * limit + rounding:
                equation = "(17)" if kind == "i1" else "(18)"
                told = f"‖Cov {NAMES[kind]}‖ = {number(value)}, bound {equation} {number(bound)}"
                found.append(f"{name} ({told})")
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


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
