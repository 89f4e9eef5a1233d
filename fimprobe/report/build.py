"""Builds a report from the statistics of the engines: groups, estimates, reliability checks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.estimators import i1, i2, i2_by_spot_checks, reliability
from fimprobe.estimators.convergence import convergence
from fimprobe.estimators.diagonal_histogram import diagonal_histogram
from fimprobe.estimators.empirical import compare_with_fisher
from fimprobe.estimators.estimate import Estimate, Geometry, GroupEstimates, OutputSummary
from fimprobe.estimators.groups import Groups, split_groups
from fimprobe.estimators.i1 import InputSums
from fimprobe.estimators.noise_scale import noise_scale
from fimprobe.estimators.variance_bounds import add_i1_bounds, add_i2_bounds
from fimprobe.report.advice import make_advice
from fimprobe.report.report import Report
from fimprobe.statistics import Measured, MomentsBatch

ROOT = "(model)"
"""Layer name of the parameters that the model itself holds."""

TOTAL = "total"
"""Group of all parameters; the others are "parameter <name>" and "layer <name>"."""


@dataclass
class _Estimates:
    """The estimates of every group, by the group's name and the fields of ``GroupEstimates``."""

    i1: dict[str, Estimate] = field(default_factory=dict)
    i2: dict[str, Estimate] = field(default_factory=dict)
    ih: dict[str, Estimate] = field(default_factory=dict)
    empirical: dict[str, Estimate] = field(default_factory=dict)
    activation: dict[str, Estimate] = field(default_factory=dict)
    geometry: dict[str, Geometry] = field(default_factory=dict)
    input_traces: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Trace of the whole model by Î₁, for each input [B]."""


def build_report(
    measured: Measured,
    layer_bounds: Mapping[str, Any],
    *,
    step: int,
    started: float,
    likelihood: str,
    ask_ih: bool,
    diagonals: bool,
    notes: Sequence[str] = (),
) -> Report:
    """Return the estimates of every parameter, of every layer and of the whole model.

    Args:
        measured: The statistics of the batch.
        layer_bounds: The bounds (20) and (21) of each layer, by its name.
        step: Training step of the measurement.
        started: ``time.perf_counter()`` at its start.
        likelihood: Name of the likelihood.
        ask_ih: Whether Î_H was requested; its moments may also be there for Î₂.
        diagonals: Whether to keep the diagonals.
        notes: Further notes of the report, after those of the engine.
    """
    scores = measured.moments["i1"]
    layers: dict[str, list[str]] = {}
    for name in scores.parameters:
        layers.setdefault(name.rpartition(".")[0] or ROOT, []).append(name)
    groups: dict[str, Sequence[str]] = {f"parameter {name}": (name,) for name in scores.parameters}
    groups |= {f"layer {layer}": names for layer, names in layers.items()}
    groups[TOTAL] = list(scores.parameters)
    unseen = reliability.seen_mass_reason(
        scores.seen_mass, size_biased=scores.inverse_weights is not None
    )
    estimates = _estimate_fisher(measured, groups, unseen, ask_ih=ask_ih, diagonals=diagonals)
    _withhold_unreliable(measured, estimates, unseen)
    estimates.empirical = _estimate_empirical(measured, groups, diagonals=diagonals)
    estimates.activation = _estimate_activations(measured, unseen)
    _add_layer_bounds(estimates.geometry, layers, layer_bounds)

    numel = {name: moments.a2.numel() for name, moments in scores.parameters.items()}
    by_group = {
        key: GroupEstimates(
            numel=sum(map(numel.__getitem__, names)),
            i1=estimates.i1[key],
            i2=estimates.i2.get(key),
            ih=estimates.ih.get(key),
            empirical=estimates.empirical.get(key),
            activation=estimates.activation.get(key),
            geometry=estimates.geometry.get(key),
        )
        for key, names in groups.items()
    }
    total = by_group[TOTAL]
    return Report(
        step=step,
        batch_size=scores.batch_size,
        draws=scores.draws,
        seconds=time.perf_counter() - started,
        likelihood=likelihood,
        parameters={name: by_group[f"parameter {name}"] for name in scores.parameters},
        layers={name: by_group[f"layer {name}"] for name in layers},
        total=total,
        coverage=scores.coverage,
        kinks=measured.kinks,
        notes=[*measured.notes, *notes],
        sizes=[] if unseen else _entry_sizes(scores),
        seconds_by_part=measured.seconds,
        label_sampling=_label_sampling(scores),
        seen_mass=scores.seen_mass,
        outputs=_summarise_outputs(measured),
        advise=make_advice,
        convergence=[] if total.i1.std_error is None else convergence(estimates.input_traces),
    )


def _estimate_fisher(
    measured: Measured, groups: Groups, unseen: str, *, ask_ih: bool, diagonals: bool
) -> _Estimates:
    """Return Î₁, Î₂ and Î_H of every group with their bounds, before the reliability checks."""
    scores, curvature = measured.moments["i1"], measured.curvature
    estimates = _Estimates()
    for part in split_groups(groups, _elements_of_group(scores)):
        common = _common_sums(measured, part, unseen=bool(unseen))
        sums = common if not unseen else InputSums.of(scores, part)
        estimates.input_traces = sums.trace[-1]  # the last group of the last part is the model
        first = i1.estimate_groups(scores, part, diagonals=diagonals, sums=sums)
        if measured.norms is not None:
            first, geometry = add_i1_bounds(measured, part, first)
            estimates.geometry |= geometry
        estimates.i1 |= first
        if curvature is not None or measured.spot_checks is not None:
            estimates.i2 |= _estimate_i2(measured, part, common, diagonals=diagonals)
        if ask_ih:
            moments = measured.moments["ih"]
            estimates.ih |= i1.estimate_groups(moments, part, diagonals=diagonals, common=common)
    return estimates


def _estimate_i2(
    measured: Measured, groups: Groups, common: InputSums, *, diagonals: bool
) -> dict[str, Estimate]:
    """Return Î₂ of some groups with its bounds, before the reliability checks."""
    curvature, grams = measured.curvature, None
    if curvature is not None:
        blocks = {key: names for key, names in groups.items() if key != TOTAL}
        parts = [i2.block_grams(curvature, blocks)] if blocks else []
        if TOTAL in groups:  # the last one
            parts.append(i2.whole_gram(curvature).unsqueeze(1))
        grams = torch.cat(parts, 1)
    if measured.spot_checks is not None or grams is None:
        estimates = i2_by_spot_checks.estimate_groups(
            measured, groups, common, grams, diagonals=diagonals
        )
    else:
        estimates = i2.estimate_groups(measured, groups, common, grams, diagonals=diagonals)
    if grams is not None and measured.norms is not None:
        estimates = add_i2_bounds(measured, groups, estimates, grams)
    return estimates


def _withhold_unreliable(measured: Measured, estimates: _Estimates, unseen: str) -> None:
    """Replace the estimates by ones without the numbers that fail a reliability check."""
    scores = measured.moments["i1"]
    sampling = _sampling(scores)
    plain_labels = scores.seen_mass is not None
    for key, first in estimates.i1.items():
        second = estimates.i2.get(key)
        disagreement = ""
        if not unseen:
            disagreement = reliability.disagreement_reason(first, second, plain_labels=plain_labels)
        estimates.i1[key] = reliability.withhold(
            first, labels_unseen=unseen, disagreement=disagreement, **sampling
        )
        if second is not None:
            checks = measured.spot_checks is not None  # they integrate over labels
            second = reliability.withhold(
                second,
                labels_unseen="" if checks else unseen,
                only_labels=True,
                disagreement=disagreement,
                non_negative=checks,
                **sampling,
            )
            if scores.draws is not None and unseen and not checks:
                # the residual R was subtracted with labels that miss what carries it
                second = _without_trace(second, unseen)
            estimates.i2[key] = second
        if key in estimates.ih:
            estimates.ih[key] = reliability.withhold(estimates.ih[key], **sampling)


def _estimate_empirical(
    measured: Measured, groups: Groups, *, diagonals: bool
) -> dict[str, Estimate]:
    """Return the empirical Fisher of every group, compared with F; empty without data labels."""
    if "empirical" not in measured.moments:
        return {}
    scores, moments = measured.moments["i1"], measured.moments["empirical"]
    # Hutchinson's vectors see all of F, drawn labels may not
    fisher = measured.moments["ih" if scores.draws and "ih" in measured.moments else "i1"]
    estimates = i1.estimate_groups(moments, groups, diagonals=diagonals)
    for key, names in groups.items():
        cosine, ratio = compare_with_fisher(moments, fisher, list(names))
        reliable = reliability.withhold(estimates[key], batch_size=scores.batch_size)
        reason = reliable.unknown.get("norm", "one of the two matrices is zero")
        lost = [n for n, x in (("cosine", cosine), ("trace_ratio", ratio)) if x is None]
        scale, scale_error, no_scale = noise_scale(measured.gradients, moments, list(names))
        unknown = {**reliable.unknown, **dict.fromkeys(lost, reason)}
        if scale is None:
            unknown |= dict.fromkeys(("noise_scale", "noise_scale_error"), no_scale)
        estimates[key] = dataclasses.replace(
            reliable,
            cosine=cosine,
            trace_ratio=ratio,
            noise_scale=scale,
            noise_scale_error=scale_error,
            unknown=unknown,
        )
    return estimates


def _estimate_activations(measured: Measured, unseen: str) -> dict[str, Estimate]:
    """Return Î₁ of the input of every layer; empty where it was not measured."""
    if measured.activations is None:
        return {}
    groups = {f"layer {name}": [name] for name in measured.activations.parameters}
    estimates = i1.estimate_groups(measured.activations, groups, diagonals=False)
    sampling = _sampling(measured.moments["i1"])
    return {
        key: reliability.withhold(estimate, labels_unseen=unseen, **sampling)
        for key, estimate in estimates.items()
    }


def _common_sums(measured: Measured, groups: Groups, *, unseen: bool) -> InputSums:
    """Return the sums with the most reliable norm of F and variance over inputs.

    They come from the labels of Î₁ where these see what carries F, else from Hutchinson's vectors or
    the factors of I(h).
    """
    moments = measured.moments
    others = moments.get("ih", moments.get("ggn")) if unseen else None
    return InputSums.of(moments["i1"] if others is None else others, groups)


def _elements_of_group(scores: MomentsBatch) -> int:
    """Return the elements in memory for one group: its Gram matrices, with products of three."""
    record = next(iter(scores.parameters.values()))
    if record.gram is None:
        return record.squared_norms.numel()
    passes = record.gram.shape[-1]
    return record.gram.numel() * (passes if scores.draws is None else 1)


def _sampling(scores: MomentsBatch) -> dict[str, Any]:
    """Return the arguments of ``withhold`` on inputs and labels."""
    return {
        "batch_size": scores.batch_size,
        "exact_labels": scores.draws is None,
        "single_label": scores.draws == 1,
    }


def _without_trace(estimate: Estimate, reason: str) -> Estimate:
    unknown = {**estimate.unknown, "trace": reason}
    return dataclasses.replace(estimate, trace=None, unknown=unknown)


def _label_sampling(scores: MomentsBatch) -> str:
    if scores.draws is None:
        return "exact"
    if scores.inverse_weights is None or bool((scores.inverse_weights == 1).all()):
        return "model"  # the family has no other draws, or not at these outputs
    return "size_biased"


def _entry_sizes(scores: MomentsBatch) -> list[tuple[float, float]]:
    """Return the histogram of the entries of diag F̂ by Î₁."""
    samples = [
        (moments.entries, moments.a2.numel())
        for moments in scores.parameters.values()
        if moments.entries is not None
    ]
    return diagonal_histogram(samples, 1 / (scores.batch_size * (scores.draws or 1)))


def _summarise_outputs(measured: Measured) -> OutputSummary | None:
    """Return the means of tr I(h), ‖I(h)‖ and ‖M‖; None where tr I(h) is unknown."""
    scores, norms = measured.moments["i1"], measured.norms
    values: list[float | None]
    if norms is not None:
        values = [float(x.mean()) for x in (norms.fisher_trace, norms.fisher_norm, norms.moment_norm)]
    elif scores.fisher_trace is not None:
        values = [scores.fisher_trace / scores.batch_size, None, None]
    else:
        return None
    trace, fisher, moment = [x if x is not None and math.isfinite(x) else None for x in values]
    if trace is None:
        return None
    return OutputSummary(fisher_trace=trace, fisher_norm=fisher, moment_norm=moment)


def _add_layer_bounds(
    geometry: dict[str, Geometry], layers: Mapping[str, Any], bounds: Mapping[str, Any]
) -> None:
    """Add (20) and (21), root mean squares over the inputs, to the norms that they bound.

    Args:
        geometry: The norms of every group; empty without bounds.
        layers: The layers of the report.
        bounds: The bounds of each layer; a layer without a rule has none.
    """
    for layer in layers:
        key = f"layer {layer}"
        if key not in geometry:
            continue
        bound = bounds.get(layer)
        if bound is None:
            geometry[key] = dataclasses.replace(geometry[key], reason="no Linear or Conv layer")
        else:
            geometry[key] = dataclasses.replace(
                geometry[key],
                frobenius_bound=_root_mean_square(bound.frobenius),
                spectral_bound=_root_mean_square(bound.spectral),
                weight_spectral_norm=bound.weight_spectral_norm,
                weight_frobenius_norm=bound.weight_frobenius_norm,
                reason=bound.reason or "",
            )


def _root_mean_square(x: Tensor | None) -> float | None:
    return None if x is None else float(x.double().square().mean()) ** 0.5
