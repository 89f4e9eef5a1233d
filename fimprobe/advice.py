"""What a report's numbers say, and what to do about it, in sentences with the numbers in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fimprobe.table import count, inputs_of, labels_of, number, pairs, percent
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
    where two standard errors of these variances could turn the choice.
    """
    low, high = {}, {}
    for kind, cost in seconds.items():
        estimate: Estimate | None = getattr(group, kind)
        need = None if estimate is None else estimate.pairs_for(1.0)
        if estimate is not None and need is not None:
            noise = 2 * (estimate.pairs_error or 0.0)
            if kind != "i2" and group.i2 is not None:
                noise = 0.0  # the inputs' part moves all of them together: it is counted once
            low[kind] = (max(1 - noise, 0.0) * need * cost) ** 0.5
            high[kind] = ((1 + noise) * need * cost) ** 0.5
    if len(low) < 2 or not any(high.values()):
        return None
    first = min(high, key=lambda kind: high[kind])
    second = min(low[kind] for kind in low if kind != first)
    if second < high[first]:
        return None
    if second == 0:
        return first, 1.0
    return first, second / high[first] if high[first] > 0 else float("inf")


TRUSTED = 0.1
"""Relative error up to which a layer's F is called trusted."""


def verdict(group: GroupEstimates, batch_size: int) -> str:
    """What this report's F of a layer is good for, in a few words.

    >>> from fimprobe.types import Estimate, GroupEstimates
    >>> verdict(GroupEstimates(1, Estimate(trace=1.0, norm=1.0, rel_error=0.3)), 32)
    'needs 288 inputs (30 % now)'
    """
    e = group.i1
    if e.norm == 0 and e.trace == 0:
        return "zero"
    if e.rel_error is None:
        why = e.unknown.get("rel_error") or e.unknown.get("norm") or "its error was not measured"
        return f"unknown ({why})"
    if e.rel_error <= TRUSTED:
        return f"trusted ({percent(e.rel_error)})"
    need = batch_size * (e.rel_error / TRUSTED) ** 2
    return f"needs {count(need)} inputs ({percent(e.rel_error)} now)"


def _errors(report: Report) -> list[str]:
    total, record = report.total.i1, _record(report)
    if total.trace == 0:
        return [_zero(report)]
    if report.seen_mass is not None and total.trace is None:
        return [
            f"Nothing is known of F by Î₁: {total.unknown['trace']}. Labels that carry F are too "
            "rare to be drawn from the model."
        ]
    lines = []
    how = f"{inputs_of(record)}, {labels_of(record)}"
    if total.rel_error is None:
        why = total.unknown.get("rel_error", "not measured")
        lines.append(f"How far off F of the whole model is at {how}, is unknown: {why}.")
    else:
        line = f"F of the whole model is off by {percent(total.rel_error)} at {how}"
        if total.rel_error > TRUSTED:
            need = count(report.batch_size * (total.rel_error / TRUSTED) ** 2)
            line += f"; 10 % takes {need} inputs measured like this"
        lines.append(f"{line}.")
    each = [(NAMES[k], getattr(report.total, k)) for k in NAMES]
    known = [(name, e) for name, e in each if e is not None and e.pairs_for(TRUSTED) is not None]
    if known:
        off = " and ".join(
            f"{name} would be off by {percent(e.error_of(inputs=report.batch_size))}"
            for name, e in known
        )
        needs = ", ".join(f"{pairs(_pairs_record(e))} with {name}" for name, e in known)
        lines.append(
            f"With one label from the model for each of {inputs_of(record)}, {off}; an error of 10 % "
            f"takes {needs} of (input, label) pairs."
        )
    groups: dict[str, list[str]] = {}
    for name, group in report.layers.items():
        told = verdict(group, report.batch_size)
        groups.setdefault(told.partition(" ")[0], []).append(
            f"{name!r} {told.partition(' ')[2]}".strip()
        )
    words = {"trusted": "Trusted to 10 %", "needs": "More inputs are needed", "unknown": "Unknown"}
    if len(report.layers) > 1:
        lines += [f"{words[k]}: {_some(groups[k], 6)}." for k in words if k in groups]
    if "zero" in groups:
        lines.append(
            f"No gradient reaches {_some(groups['zero'])} at these inputs: its Fisher information is "
            "zero there."
        )
    return lines


def _record(report: Report) -> dict[str, Any]:
    return {
        "batch_size": report.batch_size,
        "draws": "exact" if report.draws is None else report.draws,
        "label_sampling": report.label_sampling,
    }


def _pairs_record(e: Estimate) -> dict[str, Any]:
    return {"pairs_for_10_percent": e.pairs_for(0.1), "pairs_error": e.pairs_error}


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
    if not report.total.i1.norm:
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
        if g.i2 is not None and g.i2.label_variance == 0 and g.i1.norm
    ]
    if silent:
        lines.append(
            f"Labels add no variance to the diagonal of Î₂ in {_some(silent)}: it equals that of F."
        )
    return lines


def _labels(report: Report) -> list[str]:
    """What Î₁'s variance comes from, and what lowers its error."""
    e = report.total.i1
    labels, inputs = e.label_variance, e.input_variance
    if labels is None or inputs is None or labels + inputs <= 0:
        return []
    share = labels / (labels + inputs)
    line = f"Labels cause {_share(share)} of the variance of one pair of Î₁"
    if share < 0.5:
        return [f"{line}: more inputs lower its error, more labels for each do not."]
    others = [NAMES[k] for k in ("i2", "ih") if _much_better(report, k)]
    if others:
        return [f"{line}: {' and '.join(others)} of as many inputs err less."]
    remedy = "exact or size-biased labels of as many inputs err less"
    return [f"{line}: {remedy}, as does any number of labels for each input."]


def _share(x: float) -> str:
    """A share that is not rounded to all or nothing."""
    return f"{100 * x:.0f} %" if 0.01 <= x <= 0.99 else f"{100 * x:.3g} %"


def _much_better(report: Report, kind: str) -> bool:
    other: Estimate | None = getattr(report.total, kind)
    mine = report.total.i1.pairs_for(0.1)
    its = None if other is None else other.pairs_for(0.1)
    return mine is not None and its is not None and its < mine / 4


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
            rounding = 1e-5 * report.batch_size * (e.trace or 0.0) ** 2 if kind == "i1" else 0.0
            if value > factor * limit + rounding:
                equation = "(17)" if kind == "i1" else "(18)"
                told = f"‖Cov {NAMES[kind]}‖ = {number(value)}, bound {equation} {number(bound)}"
                found.append(f"{name} ({told})")
    if not found:
        return []
    return [f"VIOLATED BOUND in {_some(found)}: this cannot be; please report it with the model."]


def _probes(report: Report) -> list[str]:
    e = report.total.i2
    if e is None or not e.probe_error:
        return []
    lost = [repr(n) for n, g in report.layers.items() if g.i2 and "label_variance" in g.i2.unknown]
    if not lost and e.label_variance is not None and e.probe_error < 0.25 * e.label_variance:
        return []
    what = "Î₂'s label variance"
    if e.label_variance is not None:
        told = f"Random probes add {percent(e.probe_error / e.label_variance)} of noise to {what}"
    else:
        told = f"{what} of the whole model is lost in the noise of random probes"
    if lost:
        told += f", and lose that of {_some(lost)}"
    return [f"{told}; second_order={{'probes': K}} with a larger K lowers it as 1/√K."]


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
