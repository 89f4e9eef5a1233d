"""The TensorBoard tags of a report, their values and their descriptions.

Each estimator is a run of its own with the same tags, so that every chart overlays the estimators.
The error is the first tag in every tab: some sort "/" and "_" as the same character.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np

from fimprobe.estimators.diagonal_histogram import STEP
from fimprobe.estimators.names import KEYS, LAYER_KEYS
from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import Record
from fimprobe.report.report import Report

MAIN_RUN = ""
"""The run of what belongs to no estimator: its folder is that of the sink."""

LAYER_ERRORS, LAYER_TRACES = "fim_layer_error/", "fim_layer_log10_trace/"
"""Starts of the tags of layers with charts of their own; their labels follow."""

_LINEAR = {
    "fim/error_of_this_report": (
        "rel_error",
        "The error of this report (rel_error): how far off its diagonal of F is, as a share of it, "
        "with its inputs and their labels. 0.1 is good; from 1 on it is noise.",
    ),
    "fim/error_with_1_label": (
        "one_label_error",
        "The error with 1 label (one_label_error): how far off the estimator would be with one label "
        "from the model for each input of the report. 0.1 is good; from 1 on it is noise.",
    ),
    "fim_vs_empirical/cosine": (
        "cosine",
        "Cosine between the diagonals of the empirical Fisher and of F: 1 if proportional.",
    ),
    "fim_vs_empirical/trace_ratio": (
        "trace_ratio",
        "Trace of the empirical Fisher over that of F: 1 if they agree.",
    ),
}
"""The field of each tag, and its description."""

_LOGARITHMIC = {
    "fim/log10_input_variance": (
        "input_variance",
        "How much the diagonal of F from one (input, label) pair varies with its input, summed.",
    ),
    "fim/log10_label_variance": (
        "label_variance",
        "How much the diagonal of F from one (input, label) pair varies with its label, summed.",
    ),
    "fim/log10_pairs_for_10_percent": (
        "pairs_for_10_percent",
        "(input, label) pairs, one label from the model each, that an error of 10 % takes.",
    ),
    "fim/log10_trace": (
        "trace",
        "Estimated trace of F, the sum of its diagonal. The picture of traces has standard errors.",
    ),
    "fim_matrix_bounds/log10_bound_of_covariance_norm": (
        "bound",
        "Bound on covariance_norm: Soen & Sun (2021), eq. 17 for Î₁, from the Jacobian, and eq. 18 "
        "for Î₂, from the Hessian of the outputs.",
    ),
    "fim_matrix_bounds/log10_bound_of_label_variance": ("diagonal_bound", "Bound on label_variance."),
    "fim_matrix_bounds/log10_bound_of_total_label_variance": (
        "trace_bound",
        "Bound on total_label_variance.",
    ),
    "fim_matrix_bounds/log10_covariance_norm": (
        "covariance_norm",
        "Norm of the estimator's covariance over labels, mean over inputs.",
    ),
    "fim_matrix_bounds/log10_total_label_variance": (
        "total_label_variance",
        "Label variance of the whole matrix, not only of the diagonal.",
    ),
}
"""The field of each tag whose values span decades, and its description; the chart shows log10."""

_MAIN = {
    "fim_outputs/log10_fisher_trace": "log10 of the trace of the output Fisher, the Fisher "
    "information of the outputs, mean over inputs: it falls as the model grows confident.",
    "fim_outputs/log10_moment_norm": "log10 of the norm of the output fourth moment, which enters "
    "the bounds on Î₁, mean over inputs.",
    "fim_probe/seconds": "Seconds of this measurement.",
    "fim_probe/overhead": "Share of measuring and writing in the wall time so far, from half a "
    "minute after attach() on.",
    "fimprobe/about": "What was measured, and how to read it.",
    "fimprobe/advice": "What the numbers mean, and what to do.",
    "fimprobe/ended": "Why probing ended before the training, or never began.",
}

_HISTOGRAMS = {
    "rel_error": "Errors of this report, of all parameter tensors.",
    "log10_diagonal": "log10 of the entries of the diagonal of F; of each parameter's mean entry, "
    "counted by its size, where the entries were not kept.",
    "log10_pairs_for_10_percent": "log10 of the pairs that each parameter tensor needs for 10 %.",
}

_FIGURES = {
    "1_error": "Errors over the training: of this report, and with one label for each input.",
    "2_trace": "Trace of F over the training, ± 2 standard errors.",
    "3_error_by_layer": "Error with one label for each input, layer by layer (model order) over the "
    "training.",
    "4_variance_and_bound": "Label variance and input variance, and the bound on label variance.",
    "4b_labels_by_estimator": "Label variance: Î₁ against Î₂, by layer.",
    "5_pairs_needed": "(input, label) pairs for an error of 10 %, against those measured.",
    "6_bound_of_the_matrix": "How much the whole matrix varies with labels, measured, and its bound.",
    "7_diagonal": "Sizes of the diagonal of F. Small entries have large relative errors.",
    "8_error_by_confidence": "Error with one label for each input, against the model's confidence.",
    "9_convergence": "Error of the trace alone against the number of inputs, measured and predicted.",
}

_MAX_SCALAR = 3.4028234e38
"""The largest number in single precision, in which TensorBoard stores scalars."""


def describe(tag: str) -> str:
    """Return the meaning of a tag in one or two sentences."""
    group, _, rest = tag.partition("/")
    if tag in _MAIN:
        return _MAIN[tag]
    if group == "fim_pictures":
        return _FIGURES[rest]
    if group == "fim_spread":
        return _HISTOGRAMS[rest]
    if tag.startswith(LAYER_ERRORS):
        return f"Layer {rest}. {_LINEAR['fim/error_with_1_label'][1]}"
    if tag.startswith(LAYER_TRACES):
        return f"log10. Layer {rest}. {_LOGARITHMIC['fim/log10_trace'][1]}"
    if tag in _LOGARITHMIC:
        return f"log10. {_LOGARITHMIC[tag][1]}"
    return _LINEAR[tag][1]


def make_scalars(
    report: Report, record: Record, layers: Collection[str]
) -> dict[str, dict[str, float]]:
    """Return the finite values of all charts by run and tag.

    Args:
        report: The report.
        record: Its record (``to_dict``).
        layers: The layers with charts of their own.

    Returns:
        The values by tag, for the main run and for each estimator by its key.
    """
    total = record["total"]
    runs: dict[str, dict[str, float | None]] = {
        key: _values(total[key]) for key in KEYS if key in total
    }
    labels = label_layers(record)
    for key in LAYER_KEYS:
        for name in layers:
            estimate = record["layers"].get(name, {}).get(key, {})
            if key in runs and estimate:
                runs[key][LAYER_ERRORS + labels[name]] = estimate["one_label_error"]
                runs[key][LAYER_TRACES + labels[name]] = _log10(estimate["trace"])
    runs[MAIN_RUN] = {"fim_probe/seconds": report.seconds}
    if report.outputs is not None:
        for name in ("fisher_trace", "moment_norm"):
            runs[MAIN_RUN][f"fim_outputs/log10_{name}"] = _log10(getattr(report.outputs, name))
    return {
        run: {tag: float(x) for tag, x in values.items() if x is not None and _is_storable(x)}
        for run, values in runs.items()
    }


def _values(estimate: Record) -> dict[str, float | None]:
    """Return the values of one estimator by their tags."""
    linear = {tag: estimate.get(field) for tag, (field, _) in _LINEAR.items()}
    logs = {tag: _log10(estimate.get(field)) for tag, (field, _) in _LOGARITHMIC.items()}
    return linear | logs


def make_histograms(
    report: Report, record: Record
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yield histograms over the parameters: run, tag, finite values [n] and their weights [n].

    Args:
        report: The report.
        record: Its record (``to_dict``).
    """
    for key in LAYER_KEYS:
        estimates = [group[key] for group in record["parameters"].values() if key in group]
        for name, numbers in {
            "rel_error": [e["rel_error"] for e in estimates],
            "log10_pairs_for_10_percent": [_log10(e["pairs_for_10_percent"]) for e in estimates],
        }.items():
            values = np.array([v for v in numbers if v is not None and _is_storable(v)])
            if values.size:
                yield key, f"fim_spread/{name}", values, np.ones_like(values)
        values, weights = diagonal_values(report, key)
        if values.size:
            yield key, "fim_spread/log10_diagonal", values, weights


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
