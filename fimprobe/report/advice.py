"""What a report's numbers say, and what to do about it, in sentences with the numbers in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fimprobe.estimators.estimate import Estimate, GroupEstimates
from fimprobe.report.format import count, number, percent, some, times
from fimprobe.report.table import inputs_of, labels_of, pairs, shared_reason, without_numbers

if TYPE_CHECKING:
    from fimprobe.report.report import Report

CLEAR = 1.1
"""Estimators whose errors differ by less are called equal."""

MOST = 8
"""Layers, parameters and so on that a sentence names."""

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
        lines.append(f"Left out: {some(left, MOST)}.")
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

    >>> from fimprobe.estimators.estimate import Estimate, GroupEstimates
    >>> verdict(GroupEstimates(1, Estimate(trace=1.0, norm=1.0, rel_error=0.3)), 32)
    'needs 288 inputs (30 % now)'
    """
    e = group.i1
    if e.norm == 0 and e.trace == 0:
        return "zero"
    if e.rel_error is None:
        return f"unknown ({_why(e)})"
    if e.rel_error <= TRUSTED:
        return f"trusted ({percent(e.rel_error)})"
    return f"needs {count(_inputs_needed(e, batch_size))} inputs ({percent(e.rel_error)} now)"


def _inputs_needed(e: Estimate, batch_size: int) -> float:
    """Inputs for a relative error of 10 %, measured as these were."""
    assert e.rel_error is not None
    return batch_size * (e.rel_error / TRUSTED) ** 2


def _why(e: Estimate) -> str:
    return e.unknown.get("rel_error") or e.unknown.get("norm") or "it was not measured"


def _errors(report: Report) -> list[str]:
    total, record = report.total.i1, _record(report)
    if total.trace == 0:
        return [_zero_fisher_message(report)]
    if report.seen_mass is not None and total.trace is None:
        return [
            f"Nothing is known of F by Î₁: {total.unknown['trace']}. Labels that carry F are too "
            "rare to be drawn from the model."
        ]
    how = f"{inputs_of(record)}, {labels_of(record)}"
    verdicts = {name: verdict(g, report.batch_size) for name, g in report.layers.items()}
    unknown = {n: _why(report.layers[n].i1) for n, v in verdicts.items() if v.startswith("unknown")}
    if total.rel_error is None:
        why, where = _why(total), "the whole model"
        cause = without_numbers(why)
        if set(unknown) == set(verdicts) and {without_numbers(w) for w in unknown.values()} == {
            cause
        }:
            where, unknown = "the whole model and of each layer", {}
        lines = [f"How far off F of {where} is at {how}, is unknown: {why}."]
    else:
        line = f"F of the whole model is off by {percent(total.rel_error)} at {how}"
        if total.rel_error > TRUSTED:
            need = count(_inputs_needed(total, report.batch_size))
            line += f"; 10 % takes about {need} inputs measured like this"
        lines = [f"{line}."]
    if len(report.layers) > 1:
        lines += _of_layers(report, verdicts, unknown)
    zero = [repr(n) for n, v in verdicts.items() if v == "zero"]
    if zero:
        lines.append(
            f"No gradient reaches {some(zero, MOST)} at these inputs: F is zero there, whatever the "
            "label."
        )
    return lines + _one_label(report, _why(total) if total.rel_error is None else "")


def _of_layers(report: Report, verdicts: dict[str, str], unknown: dict[str, str]) -> list[str]:
    """Which layers are trusted, which need more inputs, and of which nothing can be said."""
    lines, layers = [], {n: g.i1 for n, g in report.layers.items()}
    trusted = [
        f"{n!r} ({percent(layers[n].rel_error)})"
        for n, v in verdicts.items()
        if v.startswith("trusted")
    ]
    needy = [
        f"{n!r} takes {count(_inputs_needed(layers[n], report.batch_size))} "
        f"({percent(layers[n].rel_error)} now)"
        for n, v in verdicts.items()
        if v.startswith("needs")
    ]
    if trusted:
        lines.append(f"Trusted to 10 %: {some(trusted, 6)}.")
    if needy:
        lines.append(f"More inputs are needed for 10 %: {some(needy, 6)}.")
    causes: dict[str, list[tuple[str, str]]] = {}
    for name, why in unknown.items():
        causes.setdefault(without_numbers(why), []).append((repr(name), why))
    for found in causes.values():
        names = some([name for name, _ in found], 6)
        lines.append(f"The error of {names} is unknown: {shared_reason(found)}.")
    return lines


def _one_label(report: Report, told: str) -> list[str]:
    """How far off the estimators are with labels drawn from the model; ``told``: what was said."""
    each = {k: e for k in NAMES if (e := getattr(report.total, k)) is not None}
    known = {k: e for k, e in each.items() if e.pairs_for(TRUSTED) is not None}
    at = f"With one label from the model for each of {inputs_of(_record(report))}"
    lines = []
    if known:
        errors = [percent(e.error_of(inputs=report.batch_size)) for e in known.values()]
        off = [f"{NAMES[k]} by {error}" for k, error in zip(known, errors, strict=True)]
        off[0] = off[0].replace(" by ", " would be off by ", 1)
        if "ih" in known:
            off[-1] += " (with one random vector each)"
        needs = [f"{pairs(_pairs_record(e))} with {NAMES[k]}" for k, e in known.items()]
        needs[0] = needs[0].replace(" with", " (input, label) pairs with", 1)
        lines.append(f"{at}, {_listed(off)}. An error of 10 % takes {', '.join(needs)}.")
    causes: dict[str, list[tuple[str, str]]] = {}
    for kind, e in each.items():
        why = e.unknown.get("pairs", "")
        if kind not in known and why and without_numbers(why) != without_numbers(told):
            causes.setdefault(without_numbers(why), []).append((NAMES[kind], why))
    for found in causes.values():
        names = _listed([name for name, _ in found])
        lines.append(f"{at} the error of {names} is unknown: {shared_reason(found)}.")
    return lines


def _record(report: Report) -> dict[str, Any]:
    return {
        "batch_size": report.batch_size,
        "draws": "exact" if report.draws is None else report.draws,
        "label_sampling": report.label_sampling,
    }


def _pairs_record(e: Estimate) -> dict[str, Any]:
    return {"pairs_for_10_percent": e.pairs_for(0.1), "pairs_error": e.pairs_error}


def _zero_fisher_message(report: Report) -> str:
    if report.draws is None or report.label_sampling == "size_biased":
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
            gain = "no error seen" if found[1] == float("inf") else times(found[1])
            wins[found[0]].append(f"{name!r} ({gain})")
    others = [k for k in ("i2", "ih") if k in seconds and getattr(report.total, k) is not None]
    told = " and ".join(
        f"by {NAMES[k]} takes {seconds[k] / seconds['i1']:.2g}" for k in others if known
    )
    timed = f"Timed here: a diagonal {told} times as long as by Î₁."
    same = "For the same computing time"
    parts = [f"{NAMES[kind]} in {some(names, MOST)}" for kind, names in wins.items() if names]
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
        names = some(silent, MOST)
        lines.append(f"Labels add no variance to the diagonal of Î₂ in {names}: it equals that of F.")
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
        return [f"{line}: more inputs lower its error, more labels for each of them do little."]
    line += ": more labels for each input lower its error, exact ones most"
    size = report.batch_size
    drawn = e.error_of(inputs=size, labels=report.draws) if report.draws is not None else None
    if report.label_sampling == "size_biased" and e.rel_error is not None and drawn is not None:
        if e.rel_error < drawn / CLEAR:
            line += (
                f"; the size-biased ones here leave {percent(e.rel_error)}, where as many from the "
                f"model would leave {percent(drawn)}"
            )
    elif report.label_sampling == "model":
        line += ", and size-biased ones do where the model is confident"
    others = [NAMES[k] for k in ("i2", "ih") if _much_better(report, k)]
    if others:
        line += f"; {_listed(others)} {'errs' if len(others) == 1 else 'err'} less at as many pairs"
    return [f"{line}."]


def _share(x: float) -> str:
    """A share that is not rounded to all or nothing."""
    if not 0 < x < 1:
        return "all" if x >= 1 else "none"
    if not 0.001 <= x <= 0.999:
        return "over 99.9 %" if x > 0.5 else "under 0.1 %"
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
    return [
        f"VIOLATED BOUND in {some(found, MOST)}: this cannot be; please report it with the model."
    ]


def _probes(report: Report) -> list[str]:
    """Where random probes, of which more can be had, are what hides Î₂'s label variance."""
    e = report.total.i2
    if e is None:
        return []
    lost = [repr(n) for n, g in report.layers.items() if g.i2 and _lost_to_probes(g.i2)]
    if _lost_to_probes(e):
        lost.insert(0, "the whole model")
    told = []
    error = e.label_variance_error
    if e.label_variance and e.probe_error and error and error >= 0.25 * e.label_variance:
        share = percent(error / e.label_variance)
        told.append(f"make Î₂'s label variance uncertain by {share}")
    if lost:
        what = "that" if told else "Î₂'s label variance"
        told.append(f"hide {what} of {some(lost, MOST)}")
    if not told:
        return []
    return [
        f"Random probes {' and '.join(told)}; second_order={{'probes': K}} with a larger K lowers "
        "their noise as 1/√K."
    ]


def _lost_to_probes(e: Estimate) -> bool:
    """Whether the label variance is lost in noise most of which is the probes'."""
    error = e.label_variance_error
    if e.label_variance is not None or not e.probe_error or error is None:
        return False
    return e.probe_error**2 >= error**2 / 2


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
