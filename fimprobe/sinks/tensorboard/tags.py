"""The TensorBoard tags of a report, their values and their descriptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from fimprobe.estimators.diagonal_histogram import STEP
from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.names import ESTIMATOR_DESCRIPTIONS, LAYER_KEYS, SYMBOLS, UNBIASED_KEYS
from fimprobe.report.report import Report

DESCRIPTIONS = {
    "trace": "Estimated trace of F: Σᵢ F̂ᵢᵢ.",
    "std_error": "Standard error of the trace, over inputs and draws.",
    "rel_error": "How far off this report's diagonal is, as a share of it: √(Σᵢ Var F̂ᵢᵢ) / ‖diag F‖, "
    "over its inputs and all draws for them. 0.1 is good; from 1 on it is noise.",
    "one_label_error": "The relative error of the estimator with one label from the model for each "
    "of the probe's inputs, for any labels of the measurement. 0.1 is good; 1 is noise.",
    "label_variance": "Variance of one pair's diagonal from the choice of the label, Σᵢ.",
    "input_variance": "Variance of one pair's diagonal from the choice of the input, Σᵢ.",
    "pairs_for_10_percent": "(input, label) pairs, labels from the model, for a relative error of "
    "10 %.",
    "cosine": "Cosine between the diagonals of the empirical Fisher and of F: 1 if proportional.",
    "trace_ratio": "Trace of the empirical Fisher over that of F: 1 if they agree.",
    "total_label_variance": "Variance from labels over the whole matrix, not only over the diagonal.",
    "covariance_norm": "‖Cov‖_F of the estimator over labels, mean over inputs.",
    "covariance_spectral_norm": "‖Cov‖ (largest eigenvalue) over labels, mean over inputs.",
    "bound": "Bound on covariance_norm: (17) ‖J‖⁴‖M‖ for Î₁, (18) ‖H‖²‖I‖ for Î₂.",
    "sharp_bound": "Bound on covariance_norm with centred logits and largest singular values.",
    "trace_bound": "Bound on total_label_variance.",
    "diagonal_bound": "Bound on label_variance.",
    "tightness": "bound / covariance_norm: 1 if the bound is attained, large if it is loose.",
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
_LAYER_VALUES = (
    "trace",
    "rel_error",
    "one_label_error",
    "label_variance",
    "pairs_for_10_percent",
    "tightness",
)
"""The values of a layer that have a chart; ``Report.scalars`` has more."""

_MAX_SCALAR = 3.4028234e38
"""The largest number in single precision, in which TensorBoard stores scalars."""

_OTHERS = {
    "fim_probe/seconds": "Seconds of this measurement.",
    "fim_outputs/fisher_trace": "tr I(h) of the outputs, mean over inputs: it goes to 0 as the model "
    "grows confident, and so does Î₁.",
    "fim_outputs/fisher_norm": "‖I(h)‖_F of the outputs, mean over inputs.",
    "fim_outputs/moment_norm": "‖M‖_F, the fourth central moment of the outputs minus I⊗I, mean over "
    "inputs.",
    "fim_probe/overhead": "Share of measuring and writing in the wall time since attach().",
    "fimprobe/about": "What was measured, and how to read it.",
    "fimprobe/advice": "What the numbers mean, and what to do.",
}

_HISTOGRAMS = {
    "rel_error": "Relative errors of all parameters.",
    "log10_diagonal": "log10 of the entries of diag F; of each parameter's mean entry, counted by "
    "its size, where the entries were not kept.",
    "log10_pairs_for_10_percent": "log10 of the pairs that each parameter needs for 10 %.",
}

_FIGURES = {
    "1_relative_error": "Relative error, layer by layer (model order) over the training.",
    "2_variance_and_bound": "Variance of a pair from labels and from inputs, and the labels' bound.",
    "3_pairs_needed": "(input, label) pairs for a relative error of 10 %, against those measured.",
    "4_bound_of_the_matrix": "Labels' covariance of the whole matrix, measured, and its bound.",
    "5_diagonal": "Sizes of the diagonal of F. Small entries are the hard ones.",
    "6_error_by_confidence": "Relative error with one label for each input, against tr I(h).",
    "7_convergence": "Error of the trace against the number of inputs, measured and predicted.",
}


def describe(tag: str) -> str:
    """Return the meaning of a tag in one or two sentences."""
    group, _, rest = tag.partition("/")
    if tag in _OTHERS:
        return _OTHERS[tag]
    if group == "fim_pictures":
        return _FIGURES[rest]
    if group == "fim_bands":
        path, _, name = rest.rpartition("/")
        end = {"_lo": "lower end", "_hi": "upper end"}.get(name[-3:], "value")
        of_layer = path.startswith("layers/")
        key = name.partition("_")[0] if of_layer else path
        where = f"layer {path.removeprefix('layers/')}" if of_layer else "the model"
        return f"Trace of F by {SYMBOLS[key]} for {where}, ± 2 standard errors: {end}."
    if group == "fim_layers":
        layer, _, name = rest.rpartition("/")
        key, _, name = name.partition("_")
        return f"Layer {layer}, {SYMBOLS[key]}. {DESCRIPTIONS[name]}"
    key, _, name = rest.partition("/")
    if group == "fim_spread":
        return f"{SYMBOLS[key]}. {_HISTOGRAMS[name]}"
    prefix = "log10. " if group == "fim_log10" else ""
    value = f"{prefix}The whole model, {SYMBOLS[key]}. {DESCRIPTIONS[name]}"
    return f"{value} {ESTIMATOR_DESCRIPTIONS[key]}"


def band_tags(key: str, layer: str | None = None) -> tuple[str, str, str]:
    """Return the tags of a trace and of the ends of its band.

    Args:
        key: The key of the estimator.
        layer: The name of a layer; None for the whole model.
    """
    start = f"fim_bands/{key}/trace" if layer is None else f"fim_bands/layers/{layer}/{key}_trace"
    return start, f"{start}_lo", f"{start}_hi"


def make_scalars(report: Report, layers: Iterable[str], banded: Iterable[str]) -> dict[str, float]:
    """Return the finite values of all charts by their tags.

    Args:
        report: The report.
        layers: The layers with charts.
        banded: The layers whose trace has a chart with a band.
    """
    names = {f"{key}_{name}" for key in LAYER_KEYS for name in _LAYER_VALUES}
    values: dict[str, float | None] = {
        tag: value
        for tag, value in report.scalars(list(layers)).items()
        if not tag.startswith("fim_layers/") or tag.rpartition("/")[2] in names
    }
    bands: dict[str, float] = {}
    for key in UNBIASED_KEYS:
        total = report.total.get(key)
        if total is None:
            continue
        bands |= _band_values(band_tags(key), total)
        if key in LAYER_KEYS:
            values |= {f"fim_log10/{key}/{n}": _log10(getattr(total, n)) for n in _LOGS}
    for layer in banded:
        for key in LAYER_KEYS:
            estimate = report.layers[layer].get(key) if layer in report.layers else None
            if estimate is not None:
                bands |= _band_values(band_tags(key, layer), estimate)
    finite = {tag: float(v) for tag, v in values.items() if v is not None and _is_storable(v)}
    return finite | bands


def _band_values(tags: tuple[str, str, str], estimate: Estimate) -> dict[str, float]:
    """Return a trace and the ends of its band: all or none, as charts drop a band with a gap."""
    if estimate.std_error is None or estimate.trace is None:
        return {}
    margin = 2 * estimate.std_error
    values = (estimate.trace, estimate.trace - margin, estimate.trace + margin)
    if not all(map(_is_storable, values)):
        return {}
    return dict(zip(tags, map(float, values), strict=True))


def make_histograms(report: Report) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield histograms over the parameters: tag, finite values [n] and their weights [n]."""
    for key in LAYER_KEYS:
        groups = report.parameters.values()
        estimates = [e for group in groups if (e := group.get(key)) is not None]
        for name, numbers in {
            "rel_error": [e.rel_error for e in estimates],
            "log10_pairs_for_10_percent": [_log10(e.pairs_for(0.1)) for e in estimates],
        }.items():
            values = np.array([v for v in numbers if v is not None and _is_storable(v)])
            if values.size:
                yield f"fim_spread/{key}/{name}", values, np.ones_like(values)
        values, weights = diagonal_values(report, key)
        if values.size:
            yield f"fim_spread/{key}/log10_diagonal", values, weights


def diagonal_values(report: Report, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return log10 of the positive entries of diag F̂ [n] and their counts [n].

    Where the entries were not kept, each parameter gives its mean entry, counted by its size.

    Args:
        report: The report.
        key: The key of the estimator.
    """
    total = report.total.get(key)
    if total is None or total.trace is None:  # then its diagonal is unknown too
        return np.zeros(0), np.zeros(0)
    if key == "i1" and report.sizes:
        lower_ends, counts = np.array(report.sizes).T
        return lower_ends + STEP / 2, counts
    values, weights = [], []
    for group in report.parameters.values():
        estimate = group.get(key)
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


def _log10(x: float | None) -> float | None:
    return math.log10(x) if x is not None and x > 0 and math.isfinite(x) else None


def _is_storable(x: float) -> bool:
    return abs(x) <= _MAX_SCALAR  # False for NaN
