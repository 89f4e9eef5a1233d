"""A report: estimates grouped by parameter, layer and model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fimprobe.advice import make_advice
from fimprobe.estimators import i1, i2, reliability
from fimprobe.estimators.empirical import compare
from fimprobe.estimators.groups import Groups, slabs
from fimprobe.estimators.i1 import InputSums
from fimprobe.estimators.sizes import count_sizes
from fimprobe.estimators.tightness import bound_hessians, bound_scores
from fimprobe.table import format_table
from fimprobe.types import (
    Estimate,
    FimprobeError,
    Geometry,
    GroupEstimates,
    Measured,
    MomentsBatch,
    OutputSummary,
)

ROOT = "(model)"
"""Layer name of parameters that the model itself holds."""


@dataclass(frozen=True)
class Report:
    """One measurement of one or more estimators, by parameter, by layer and for the model.

    ``rel_error`` and ``std_error`` say how far off its numbers are; ``error_of`` and ``pairs_for``
    how far off an estimator is with other numbers of inputs and labels.
    """

    step: int
    batch_size: int
    draws: int | None
    """Labels drawn for each input; None: exact expectation."""
    seconds: float
    likelihood: str
    parameters: dict[str, GroupEstimates]
    layers: dict[str, GroupEstimates]
    total: GroupEstimates
    coverage: dict[str, str] = field(default_factory=dict)
    kinks: list[str] = field(default_factory=list)
    """Modules (or autograd nodes) that are not twice differentiable, where Î₂ was measured."""
    notes: list[str] = field(default_factory=list)
    """What was asked for and could not be measured, with the reason."""
    sizes: list[tuple[float, float]] = field(default_factory=list)
    """How large the entries of diag F̂ (Î₁) are: log10 of the lower end of half a decade, entries in
    it; those that are not above 0 are left out. Empty of a sharded model."""
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    """Where the time went: forward, i1, ih, bounds, i2, and of that "i2 diagonal"."""
    label_sampling: str = "model"
    """How the labels of the measurement came about: size_biased, model, or exact."""
    seen_mass: float | None = None
    """Of labels drawn from the model: Σ‖δ‖² over its expectation; far from 1 nothing is known."""
    outputs: OutputSummary | None = None
    """tr I(h) of the outputs; with bounds also ‖I(h)‖_F and ‖M‖_F."""
    convergence: list[tuple[int, float]] = field(default_factory=list)
    """Numbers n of inputs, and the relative spread of Î₁'s trace over groups of n inputs of this
    report: it falls as 1/√n where inputs are independent. Empty where an error is not known."""

    @property
    def advice(self) -> list[str]:
        """What the numbers say and what to do about it, in sentences."""
        return make_advice(self)

    def error_of(
        self,
        estimator: str,
        *,
        inputs: int | None = None,
        labels: int | None = 1,
        layer: str | None = None,
    ) -> float | None:
        """Relative error of an estimator with labels drawn from the model.

        √((V_x + V_y/S)/N) / ‖diag F‖₂, whatever labels this report was measured with.

        Args:
            estimator: "i1", "i2" or "ih".
            inputs: N; None: as many as in this report.
            labels: S for each input; None: exact.
            layer: a layer's name; None: the whole model.

        Raises:
            FimprobeError: an estimator or layer that was not measured.
        """
        return self._estimate(estimator, layer).error_of(
            inputs=self.batch_size if inputs is None else inputs, labels=labels
        )

    def pairs_for(
        self, estimator: str, eps: float = 0.1, *, layer: str | None = None
    ) -> float | None:
        """Pairs (input, label) that an estimator takes for a relative error ``eps``."""
        return self._estimate(estimator, layer).pairs_for(eps)

    def _estimate(self, estimator: str, layer: str | None) -> Estimate:
        group = self.total if layer is None else self.layers.get(layer)
        if group is None:
            known = ", ".join(map(repr, self.layers))
            raise FimprobeError(f"layer={layer!r} was not measured; use one of {known}")
        found = getattr(group, estimator, None) if estimator in ("i1", "i2", "ih") else None
        if found is None:
            known = ", ".join(k for k in ("i1", "i2", "ih") if getattr(group, k) is not None)
            raise FimprobeError(f"estimator={estimator!r} was not measured; use one of {known}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Numbers and names only: what JSON can hold."""

        def group(g: GroupEstimates) -> dict[str, Any]:
            found: dict[str, Any] = {"numel": g.numel, "i1": self._record(g.i1)}
            for kind in ("i2", "ih", "empirical", "activation"):
                estimate = getattr(g, kind)
                if estimate is not None:
                    found[kind] = self._record(estimate)
            if g.geometry is not None:
                found["geometry"] = dataclasses.asdict(g.geometry)
            return found

        return {
            "step": self.step,
            "batch_size": self.batch_size,
            "draws": "exact" if self.draws is None else self.draws,
            "seconds": self.seconds,
            "likelihood": self.likelihood,
            "label_sampling": self.label_sampling,
            "seen_mass": self.seen_mass,
            "outputs": None if self.outputs is None else dataclasses.asdict(self.outputs),
            "total": group(self.total),
            "layers": {name: group(g) for name, g in self.layers.items()},
            "parameters": {name: group(g) for name, g in self.parameters.items()},
            "coverage": self.coverage,
            "kinks": self.kinks,
            "notes": self.notes,
            "sizes": [list(pair) for pair in self.sizes],
            "convergence": [list(pair) for pair in self.convergence],
            "advice": self.advice,
        }

    def scalars(self, layers: Collection[str] | None = None) -> dict[str, float]:
        """What TensorBoard is given, by its tags: finite numbers only, for loggers of any kind.

        ``fim/<estimator>/<value>`` and ``fim_bounds/<estimator>/<value>`` for the model,
        ``fim_layers/<layer>/<estimator>_<value>`` for each of ``layers`` (None: all; TensorBoard
        charts fewer values of them), ``fim_outputs/<value>``, ``fim_probe/seconds``.

        >>> import fimprobe, torch
        >>> report = fimprobe.measure(torch.nn.Linear(2, 2), torch.ones(4, 2), likelihood="gaussian")
        >>> report.scalars()["fim/i1/trace"] == report.total.i1.trace
        True
        """
        values: dict[str, float | None] = {}
        for kind in ("i1", "i2", "ih", "empirical"):
            total = getattr(self.total, kind)
            if total is not None:
                values |= {f"fim/{kind}/{name}": getattr(total, name) for name in _TOTAL}
                values |= {f"fim_bounds/{kind}/{name}": getattr(total, name) for name in _BOUNDS}
                if kind != "empirical":
                    values[f"fim/{kind}/pairs_for_10_percent"] = total.pairs_for(0.1)
                    values[f"fim/{kind}/one_label_error"] = self._one_label_error(total)
        if self.outputs is not None:
            for name, value in dataclasses.asdict(self.outputs).items():
                values[f"fim_outputs/{name}"] = value
        values["fim_probe/seconds"] = self.seconds
        for layer, group in self.layers.items():
            if layers is None or layer in layers:
                values |= self._of_layer(f"fim_layers/{layer}/", group)
        return {
            tag: float(value)
            for tag, value in values.items()
            if value is not None and math.isfinite(value)
        }

    def __str__(self) -> str:
        """A table of the layers."""
        return format_table(self.to_dict())

    def _one_label_error(self, estimate: Estimate) -> float | None:
        """With one label for each of this report's inputs."""
        return estimate.error_of(inputs=self.batch_size, labels=1)

    def _record(self, e: Estimate) -> dict[str, Any]:
        values = {name: getattr(e, name) for name in _VALUES}
        if e.trace_range is not None:
            values["trace_range"] = list(e.trace_range)
        derived = {
            "one_label_error": self._one_label_error(e),
            "pairs_for_10_percent": e.pairs_for(0.1),
            "pairs_error": e.pairs_error,
            "tightness": e.tightness,
            "sharp_tightness": e.sharp_tightness,
            "trace_tightness": e.trace_tightness,
            "diagonal_tightness": e.diagonal_tightness,
            "unknown": dict(e.unknown),
        }
        return values | derived

    def _of_layer(self, prefix: str, group: GroupEstimates) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for kind in ("i1", "i2"):
            estimate = getattr(group, kind)
            if estimate is not None:
                for name in ("trace", "rel_error", "label_variance", "tightness", "trace_tightness"):
                    values[f"{prefix}{kind}_{name}"] = getattr(estimate, name)
                values[f"{prefix}{kind}_pairs_for_10_percent"] = estimate.pairs_for(0.1)
                values[f"{prefix}{kind}_one_label_error"] = self._one_label_error(estimate)
        if group.activation is not None:
            values[f"{prefix}input_i1_trace"] = group.activation.trace
            values[f"{prefix}input_i1_label_variance"] = group.activation.label_variance
        if group.geometry is not None:
            for name in ("jacobian_norm", "spectral_bound", "weight_spectral_norm"):
                values[f"{prefix}{name}"] = getattr(group.geometry, name)
        return values


def make_report(
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
    unseen = reliability.seen_mass_reason(scores.seen_mass)
    measured_i1: dict[str, Estimate] = {}
    measured_i2: dict[str, Estimate] = {}
    measured_ih: dict[str, Estimate] = {}
    geometry: dict[str, Geometry] = {}
    for part in slabs(groups, _numbers(scores)):
        common = _common(measured, part, unseen=bool(unseen))
        own = common if not unseen else InputSums.of(scores, part)
        found = i1.estimate_groups(scores, part, diagonals=diagonals, sums=own)
        trace = own.trace[-1]  # the last group is the model
        if measured.norms is not None:
            found, shapes = bound_scores(measured, part, found)
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
                bent = bound_hessians(measured, part, bent, grams)
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
            key: reliability.withhold(e, batch_size=scores.batch_size, labels_unseen=unseen)
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
        sizes=[] if unseen else count_sizes(entries, 1 / count),
        seconds_by_part=measured.seconds,
        label_sampling=_label_sampling(scores),
        seen_mass=scores.seen_mass,
        outputs=_summarise_outputs(measured),
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
    return "model" if scores.inverse_weights is None else "size_biased"


def _summarise_outputs(measured: Measured) -> OutputSummary | None:
    scores, norms = measured.moments["i1"], measured.norms
    if norms is not None:
        return OutputSummary(
            fisher_trace=float(norms.fisher_trace.mean()),
            fisher_norm=float(norms.fisher_norm.mean()),
            moment_norm=float(norms.moment_norm.mean()),
        )
    if scores.fisher_trace is None:
        return None
    return OutputSummary(fisher_trace=scores.fisher_trace / scores.batch_size)


def _common(measured: Measured, groups: Groups, *, unseen: bool) -> InputSums:
    """The sums that tell F's variance over inputs and its norm best.

    Î₁'s labels where these see what carries F; else Hutchinson's vectors, which always do.
    """
    ih = measured.moments.get("ih")
    return InputSums.of(ih if unseen and ih is not None else measured.moments["i1"], groups)


def _believed(
    scores: MomentsBatch,
    unseen: str,
    i1_estimates: dict[str, Estimate],
    i2_estimates: dict[str, Estimate],
    ih_estimates: dict[str, Estimate],
) -> tuple[dict[str, Estimate], dict[str, Estimate], dict[str, Estimate]]:
    """Without what cannot be believed, in every group."""
    how: dict[str, Any] = {"batch_size": scores.batch_size, "exact_labels": scores.draws is None}
    how["single_label"] = scores.draws == 1
    first, second, third = {}, {}, {}
    for key, one in i1_estimates.items():
        other = i2_estimates.get(key)
        apart = "" if unseen else reliability.disagreement_reason(one, other)
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


_NO_NUMBERS = (
    "diagonal",
    "diagonal_label_variance",
    "diagonal_input_variance",
    "pair_variance",
    "unknown",
)
_VALUES = tuple(f.name for f in dataclasses.fields(Estimate) if f.name not in _NO_NUMBERS)


_TOTAL = (
    "trace",
    "std_error",
    "rel_error",
    "label_variance",
    "input_variance",
    "cosine",
    "trace_ratio",
)

_BOUNDS = (
    "total_label_variance",
    "bound",
    "sharp_bound",
    "trace_bound",
    "diagonal_bound",
    "covariance_norm",
    "covariance_spectral_norm",
    "tightness",
    "probe_error",
)
