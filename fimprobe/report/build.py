"""From the engines' statistics to a report: groups, estimates, what can be believed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fimprobe.estimators import i1, i2, reliability
from fimprobe.estimators.diagonal_histogram import diagonal_histogram
from fimprobe.estimators.empirical import compare
from fimprobe.estimators.estimate import Estimate, Geometry, GroupEstimates, OutputSummary
from fimprobe.estimators.groups import Groups, split_groups
from fimprobe.estimators.i1 import InputSums
from fimprobe.estimators.variance_bounds import add_i1_bounds, add_i2_bounds
from fimprobe.report.advice import make_advice
from fimprobe.report.report import Report
from fimprobe.statistics import Measured, MomentsBatch

ROOT = "(model)"
"""Layer name of parameters that the model itself holds."""


def build_report(
    measured: Measured,
    chain: Mapping[str, Any],
    *,
    step: int,
    seconds: float,
    likelihood: str,
    ask_ih: bool,
    diagonals: bool,
) -> Report:
    """Group what was measured by parameter, by the layer that owns it, and over all."""
    scores = measured.moments["i1"]
    layers: dict[str, list[str]] = {}
    for name in scores.parameters:
        layers.setdefault(name.rpartition(".")[0] or ROOT, []).append(name)
    groups = {f"parameter {n}": [n] for n in scores.parameters}
    groups |= {f"layer {n}": names for n, names in layers.items()}
    groups["total"] = list(scores.parameters)
    biased = scores.inverse_weights is not None
    unseen = reliability.seen_mass_reason(scores.seen_mass, size_biased=biased)
    measured_i1: dict[str, Estimate] = {}
    measured_i2: dict[str, Estimate] = {}
    measured_ih: dict[str, Estimate] = {}
    geometry: dict[str, Geometry] = {}
    for part in split_groups(groups, _numbers(scores)):
        common = _common(measured, part, unseen=bool(unseen))
        own = common if not unseen else InputSums.of(scores, part)
        found = i1.estimate_groups(scores, part, diagonals=diagonals, sums=own)
        trace = own.trace[-1]  # the last group is the model
        if measured.norms is not None:
            found, shapes = add_i1_bounds(measured, part, found)
            geometry |= shapes
        measured_i1 |= found
        if measured.curvature is not None:
            curvature = measured.curvature
            grams = {
                key: i2.whole_gram(curvature) if key == "total" else i2.block_gram(curvature, names)
                for key, names in part.items()
            }
            bent = i2.estimate_groups(measured, part, common, grams, diagonals=diagonals)
            if measured.norms is not None:
                bent = add_i2_bounds(measured, part, bent, grams)
            measured_i2 |= bent
        if ask_ih:
            moments = measured.moments["ih"]
            measured_ih |= i1.estimate_groups(moments, part, diagonals=diagonals, common=common)
    estimates, second, hutchinson = _believed(scores, unseen, measured_i1, measured_i2, measured_ih)
    if scores.draws is not None and measured.curvature is not None and unseen:
        # the residual was subtracted with labels that are not those that carry it
        second = {key: _without_residual(e, unseen) for key, e in second.items()}
    data: dict[str, Estimate] = {}
    if "empirical" in measured.moments:
        data = i1.estimate_groups(measured.moments["empirical"], groups, diagonals=diagonals)
        best = measured.moments["ih" if scores.draws and "ih" in measured.moments else "i1"]
        for key, names in groups.items():
            cosine, ratio = compare(measured.moments["empirical"], best, names)
            judged = reliability.withhold(data[key], batch_size=scores.batch_size)
            data[key] = dataclasses.replace(judged, cosine=cosine, trace_ratio=ratio)
    hidden: dict[str, Estimate] = {}
    if measured.activations is not None:
        paths = {f"layer {n}": [n] for n in measured.activations.parameters}
        hidden = {
            key: reliability.withhold(e, labels_unseen=unseen, **_how(scores))
            for key, e in i1.estimate_groups(measured.activations, paths, diagonals=False).items()
        }

    def group(key: str) -> GroupEstimates:
        numel = sum(scores.parameters[n].a2.numel() for n in groups[key])
        shape = geometry.get(key)
        kind, _, layer = key.partition(" ")
        if shape is not None and kind == "layer":
            shape = _with_chain(shape, chain.get(layer), measured.norms is not None)
        return GroupEstimates(
            numel,
            estimates[key],
            second.get(key),
            hutchinson.get(key),
            data.get(key),
            hidden.get(key),
            shape,
        )

    count = scores.batch_size * (scores.draws or 1)
    known = scores.parameters.values()
    entries = [(m.entries, m.a2.numel()) for m in known if m.entries is not None]
    return Report(
        step=step,
        batch_size=scores.batch_size,
        draws=scores.draws,
        seconds=seconds,
        likelihood=likelihood,
        parameters={name: group(f"parameter {name}") for name in scores.parameters},
        layers={name: group(f"layer {name}") for name in layers},
        total=group("total"),
        coverage=scores.coverage,
        kinks=measured.kinks,
        notes=measured.notes,
        sizes=[] if unseen else diagonal_histogram(entries, 1 / count),
        seconds_by_part=measured.seconds,
        label_sampling=_label_sampling(scores),
        seen_mass=scores.seen_mass,
        outputs=_summarise_outputs(measured),
        advise=make_advice,
        convergence=_converge(trace) if estimates["total"].std_error is not None else [],
    )


def _converge(trace: Tensor) -> list[tuple[int, float]]:
    """The spread of the trace's mean over n inputs, from disjoint groups, at least four of them."""
    mean, found, size = float(trace.mean()), [], 1
    while mean > 0 and 4 * size <= len(trace):
        groups = trace[: len(trace) // size * size].view(-1, size).mean(1)
        found.append((size, float(groups.std()) / mean))
        size *= 2
    return found


def _label_sampling(scores: MomentsBatch) -> str:
    if scores.draws is None:
        return "exact"
    if scores.inverse_weights is None or bool((scores.inverse_weights == 1).all()):
        return "model"  # the family has no other draws, or not at these outputs
    return "size_biased"


def _summarise_outputs(measured: Measured) -> OutputSummary | None:
    scores, norms = measured.moments["i1"], measured.norms
    if norms is not None:
        values = [float(x.mean()) for x in (norms.fisher_trace, norms.fisher_norm, norms.moment_norm)]
    elif scores.fisher_trace is not None:
        values = [scores.fisher_trace / scores.batch_size]
    else:
        return None
    if not math.isfinite(values[0]):
        return None
    trace, *rest = [x if math.isfinite(x) else None for x in values]
    assert trace is not None
    return OutputSummary(trace, *rest)


def _common(measured: Measured, groups: Groups, *, unseen: bool) -> InputSums:
    """The sums that tell F's variance over inputs and its norm best.

    Î₁'s labels where these see what carries F; else Hutchinson's vectors, which always do.
    """
    ih = measured.moments.get("ih")
    return InputSums.of(ih if unseen and ih is not None else measured.moments["i1"], groups)


def _how(scores: MomentsBatch) -> dict[str, Any]:
    """What the numbers were made of, as far as it tells which can be believed."""
    return {
        "batch_size": scores.batch_size,
        "exact_labels": scores.draws is None,
        "single_label": scores.draws == 1,
    }


def _believed(
    scores: MomentsBatch,
    unseen: str,
    i1_estimates: dict[str, Estimate],
    i2_estimates: dict[str, Estimate],
    ih_estimates: dict[str, Estimate],
) -> tuple[dict[str, Estimate], dict[str, Estimate], dict[str, Estimate]]:
    """Without what cannot be believed, in every group."""
    how = _how(scores)
    plain = scores.seen_mass is not None
    first, second, third = {}, {}, {}
    for key, one in i1_estimates.items():
        other = i2_estimates.get(key)
        apart = "" if unseen else reliability.disagreement_reason(one, other, plain_labels=plain)
        first[key] = reliability.withhold(one, labels_unseen=unseen, disagreement=apart, **how)
        if other is not None:
            second[key] = reliability.withhold(
                other, labels_unseen=unseen, only_labels=True, disagreement=apart, **how
            )
        if key in ih_estimates:
            third[key] = reliability.withhold(ih_estimates[key], **how)
    return first, second, third


def _without_residual(estimate: Estimate, reason: str) -> Estimate:
    unknown = {**estimate.unknown, "trace": reason}
    return dataclasses.replace(estimate, trace=None, unknown=unknown)


def _numbers(scores: MomentsBatch) -> int:
    """What the estimates of one group hold at once: Gram matrices, and products of three."""
    record = next(iter(scores.parameters.values()))
    if record.gram is None:
        return record.squared_norms.numel()
    passes = record.gram.shape[-1]
    return record.gram.numel() * (passes if scores.draws is None else 1)


def _with_chain(geometry: Geometry, bound: Any, wanted: bool) -> Geometry:
    """(20) and (21) of a layer beside what they bound: root mean squares over the inputs."""
    if bound is None:
        reason = "no Linear or Conv layer" if wanted else ""
        return dataclasses.replace(geometry, reason=reason)

    def rms(x: Any) -> float | None:
        return None if x is None else float(x.double().square().mean()) ** 0.5

    return dataclasses.replace(
        geometry,
        frobenius_bound=rms(bound.frobenius),
        spectral_bound=rms(bound.spectral),
        weight_spectral_norm=bound.weight_spectral_norm,
        weight_frobenius_norm=bound.weight_frobenius_norm,
        reason=bound.reason or "",
    )
