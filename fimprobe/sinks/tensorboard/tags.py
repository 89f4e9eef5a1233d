"""The charts of a report: tags, their values, and what each means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from fimprobe.estimators.diagonal_histogram import STEP
from fimprobe.estimators.estimate import Estimate, GroupEstimates
from fimprobe.report.report import Report

KINDS = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H", "empirical": "Empirical Fisher"}

WHAT = {
    "i1": "Î₁ = mean of (∂ log p/∂θ)², labels drawn from the model.",
    "i2": "Î₂ = minus the mean second derivative of log p, labels drawn from the model.",
    "ih": "Î_H = Hutchinson's estimator: F seen through random directions of the outputs.",
    "empirical": "With the labels of the data: not the Fisher information.",
}

MEANING = {
    "trace": "Estimated trace of F: Σᵢ F̂ᵢᵢ.",
    "std_error": "Standard error of the trace, over inputs and draws.",
    "rel_error": "How far off this report's diagonal is, as a share of it: √(Σᵢ Var F̂ᵢᵢ) / ‖diag F‖, "
    "over its inputs and all that was drawn for them. 0.1 is good; from 1 on it is noise.",
    "one_label_error": "The relative error of the estimator with one label from the model for each "
    "of the probe's inputs, whatever labels it was measured with. 0.1 is good; 1 is noise.",
    "label_variance": "Variance of one pair's diagonal from the choice of the label, Σᵢ.",
    "input_variance": "Variance of one pair's diagonal from the choice of the input, Σᵢ.",
    "pairs_for_10_percent": "(input, label) pairs, labels from the model, that a relative error of "
    "10 % takes.",
    "cosine": "Cosine between the diagonals of the empirical Fisher and of F: 1 if proportional.",
    "trace_ratio": "Trace of the empirical Fisher over that of F: 1 if they agree.",
    "total_label_variance": "Variance from labels over the whole matrix, not the diagonal only.",
    "covariance_norm": "‖Cov‖_F of the estimator over labels, mean over inputs.",
    "covariance_spectral_norm": "‖Cov‖ (largest eigenvalue) over labels, mean over inputs.",
    "bound": "Bound on covariance_norm: (17) ‖J‖⁴‖M‖ for Î₁, (18) ‖H‖²‖I‖ for Î₂.",
    "sharp_bound": "Bound on covariance_norm with centred logits and largest singular values.",
    "trace_bound": "Bound on total_label_variance.",
    "diagonal_bound": "Bound on label_variance.",
    "tightness": "bound / covariance_norm: 1 if the bound is attained, large if it says little.",
    "probe_error": "Standard error that random probes add to label_variance; more probes lower it.",
}

_LOGS = (
    "label_variance",
    "diagonal_bound",
    "total_label_variance",
    "trace_bound",
    "covariance_norm",
    "bound",
    "sharp_bound",
)
_LAYER = (
    "trace",
    "rel_error",
    "one_label_error",
    "label_variance",
    "pairs_for_10_percent",
    "tightness",
)
"""Of a layer; ``Report.scalars`` has more."""

_LARGEST = 3.4028234e38  # scalars are stored in single precision

_OTHERS = {
    "fim_probe/seconds": "Seconds that this measurement took.",
    "fim_outputs/fisher_trace": "tr I(h) of the outputs, mean over inputs: it goes to 0 as the model "
    "grows confident, and Î₁ with it.",
    "fim_outputs/fisher_norm": "‖I(h)‖_F of the outputs, mean over inputs.",
    "fim_outputs/moment_norm": "‖M‖_F, the fourth central moment of the outputs less I⊗I, mean over "
    "inputs.",
    "fim_probe/overhead": "Share of the wall time since attach() that measuring and writing took.",
    "fimprobe/about": "What was measured and how to read it.",
    "fimprobe/advice": "What the numbers say and what to do about it.",
}

_SPREADS = {
    "rel_error": "Relative errors of all parameters: how many are well estimated, and how many not.",
    "log10_diagonal": "log10 of the entries of diag F; of each parameter's mean entry, counted by "
    "its size, where the entries were not kept.",
    "log10_pairs_for_10_percent": "log10 of the pairs that each parameter needs for 10 %.",
}

_PICTURES = {
    "1_relative_error": "Relative error, layer by layer (model order) over the training.",
    "2_variance_and_bound": "Variance of a pair from labels and from inputs, and the labels' bound.",
    "3_pairs_needed": "(input, label) pairs for a relative error of 10 %, against those measured.",
    "4_bound_of_the_matrix": "Labels' covariance of the whole matrix, measured, and its bound.",
    "5_diagonal": "Sizes of the diagonal of F. Small entries are the hard ones.",
    "6_error_by_confidence": "Relative error with one label for each input, against tr I(h).",
    "7_convergence": "Error of the trace against the number of inputs, measured and predicted.",
}


def describe(tag: str) -> str:
    """What a tag means, in a sentence or two."""
    group, _, rest = tag.partition("/")
    if tag in _OTHERS:
        return _OTHERS[tag]
    if group == "fim_pictures":
        return _PICTURES[rest]
    if group == "fim_bands":
        path, _, name = rest.rpartition("/")
        end = {"_lo": "lower end", "_hi": "upper end"}.get(name[-3:], "value")
        kind = name.partition("_")[0] if path.startswith("layers/") else path
        where = f"layer {path[7:]}" if path.startswith("layers/") else "the model"
        return f"Trace of F by {KINDS[kind]} for {where}, ± 2 standard errors: {end}."
    if group == "fim_layers":
        layer, _, name = rest.rpartition("/")
        kind, _, name = name.partition("_")
        return f"Layer {layer}, {KINDS[kind]}. {MEANING[name]}"
    kind, _, name = rest.partition("/")
    if group == "fim_spread":
        return f"{KINDS[kind]}. {_SPREADS[name]}"
    prefix = "log10. " if group == "fim_log10" else ""
    return f"{prefix}The whole model, {KINDS[kind]}. {MEANING[name]} {WHAT[kind]}"


def band(kind: str, layer: str | None = None) -> tuple[str, str, str]:
    """Tags of a trace and the ends of its band, of a layer or the model."""
    start = f"fim_bands/{kind}/trace" if layer is None else f"fim_bands/layers/{layer}/{kind}_trace"
    return start, f"{start}_lo", f"{start}_hi"


def make_scalars(report: Report, layers: Iterable[str], banded: Iterable[str]) -> dict[str, float]:
    """Every chart's value: the model's, those of ``layers``, bands for ``banded``; all finite."""
    values: dict[str, float | None] = {}
    layers = list(layers)
    ends = {f"{kind}_{name}" for kind in ("i1", "i2") for name in _LAYER}
    for tag, value in report.scalars(layers).items():
        if not tag.startswith("fim_layers/") or tag.rpartition("/")[2] in ends:
            values[tag] = value
    bands: list[tuple[tuple[str, str, str], Estimate]] = []
    for kind in KINDS:
        total: Estimate | None = getattr(report.total, kind)
        if total is None:
            continue
        if kind in ("i1", "i2"):
            values |= {f"fim_log10/{kind}/{n}": _log10(getattr(total, n)) for n in _LOGS}
        if kind != "empirical":
            bands.append((band(kind), total))
    for layer in banded:
        if layer in report.layers:
            bands += [(band(k, layer), e) for k, e in _estimates(report.layers[layer])]
    found = {tag: float(v) for tag, v in values.items() if v is not None and _fits(v)}
    for tags, estimate in bands:  # all three or none, for a chart drops a band with a gap
        if estimate.std_error is not None and estimate.trace is not None:
            wide = 2 * estimate.std_error
            trio = (estimate.trace, estimate.trace - wide, estimate.trace + wide)
            if all(map(_fits, trio)):
                found |= dict(zip(tags, map(float, trio), strict=True))
    return found


def make_spreads(report: Report) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Histograms over the parameters: tag, finite values, and how often each counts."""
    for kind in ("i1", "i2"):
        groups = [g for g in report.parameters.values() if getattr(g, kind) is not None]
        estimates: list[Estimate] = [getattr(g, kind) for g in groups]
        for name, found in {
            "rel_error": [e.rel_error for e in estimates],
            "log10_pairs_for_10_percent": [_log10(e.pairs_for(0.1)) for e in estimates],
        }.items():
            values = np.array([v for v in found if v is not None and _fits(v)])
            if values.size:
                yield f"fim_spread/{kind}/{name}", values, np.ones_like(values)
        values, weights = diagonal_values(report, kind)
        if values.size:
            yield f"fim_spread/{kind}/log10_diagonal", values, weights


def diagonal_values(report: Report, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """log10 of the positive entries of diag F̂ and their counts; else of each parameter's mean."""
    total: Estimate | None = getattr(report.total, kind)
    if total is None or total.trace is None:  # nothing is known of its diagonal either
        return np.zeros(0), np.zeros(0)
    if kind == "i1" and report.sizes:
        middles, counts = np.array(report.sizes).T
        return middles + STEP / 2, counts
    values, weights = [], []
    for group in report.parameters.values():
        estimate: Estimate | None = getattr(group, kind)
        if estimate is None:
            continue
        if estimate.diagonal is not None:
            for entries in estimate.diagonal.values():
                positive = entries[entries > 0].double().cpu().numpy()
                values.append(np.log10(positive))
                weights.append(np.ones_like(positive))
        elif estimate.trace is not None and estimate.trace > 0 and math.isfinite(estimate.trace):
            values.append(np.log10([estimate.trace / group.numel]))
            weights.append(np.array([float(group.numel)]))
    empty = np.zeros(0)
    return np.concatenate([empty, *values]), np.concatenate([empty, *weights])


def _estimates(group: GroupEstimates) -> list[tuple[str, Estimate]]:
    return [("i1", group.i1), *([("i2", group.i2)] if group.i2 is not None else [])]


def _log10(x: float | None) -> float | None:
    return math.log10(x) if x is not None and x > 0 and math.isfinite(x) else None


def _fits(x: float) -> bool:
    return abs(x) <= _LARGEST  # False for NaN
