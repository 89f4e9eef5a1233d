"""The figures of a run, from the records of its reports.

TensorBoard and the HTML page show the same ones. Every function returns None where the records have
no values for its figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fimprobe.estimators.diagonal_histogram import STEP
from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS, UNBIASED_KEYS
from fimprobe.plots.history import MAX_COLUMNS
from fimprobe.plots.layers import label_rows, read_layers, shown_layers
from fimprobe.plots.style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    MARKERS,
    STYLES,
    Axes,
    Figure,
    add_legend,
    draw_grids,
    label_axis,
    make_chart,
    make_falling,
    make_logarithmic,
    make_panels,
    make_shares,
    make_steps,
    name_panels,
    name_rows,
)
from fimprobe.report.format import subsample
from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import (
    Record,
    error_with_drawn_labels,
    pairs_needed,
)

MIN_CHANGE, MIN_POINTS = 2.0, 4
"""How much the trace of the output Fisher must change, over how many reports, to be an axis."""


def draw_errors(records: Sequence[Record]) -> Figure | None:
    """Draw the errors of the whole model over steps, on a logarithmic scale.

    Thick lines are the errors of the reports, thin ones those with one label for each input.
    """
    reported = {key: _series(records, key, "rel_error") for key in UNBIASED_KEYS}
    one_label = {key: _errors(records, key) for key in UNBIASED_KEYS}
    if not any((errors > 0).any() for errors in (*reported.values(), *one_label.values())):
        return None
    figure, axis = make_chart()
    for key, errors in reported.items():
        if (errors > 0).any():
            _draw_line(axis, records, _positive(errors), key, width=3.0)
    steps = np.array([record["step"] for record in records])
    shown = [key for key, errors in one_label.items() if (errors > 0).any()]
    for key in shown:
        axis.plot(steps, one_label[key], "--", marker=".", ms=4, lw=1, color=COLORS[key])
    if shown:
        axis.plot([], [], "--", lw=1, color=INK, label="1 label")
    unknown = np.isnan(list(reported.values())).all(0)
    if unknown.any():
        axis.plot(
            steps[unknown], np.full(unknown.sum(), 0.96), "o", ms=6, mfc="none", mec=GREY, mew=1.5,
            transform=axis.get_xaxis_transform(), clip_on=False, label="unknown",
        )  # fmt: skip
    _draw_noise(axis)
    make_steps(axis, shares=True)
    if unknown.any():  # their marks stand above all values
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])
    _center_single(axis, records)
    return add_legend(figure, axis)


def draw_traces(records: Sequence[Record]) -> Figure | None:
    """Draw traces over steps with ± 2 standard errors; hollow points where these are unknown."""
    traces = {key: _series(records, key, "trace") for key in UNBIASED_KEYS}
    traces = {key: values for key, values in traces.items() if np.isfinite(values).any()}
    if not traces:
        return None
    figure, axis = make_chart()
    steps = np.array([record["step"] for record in records])
    hollow = False
    for key, values in traces.items():
        margin = 2 * _series(records, key, "std_error")
        known = np.isfinite(values + margin)
        _draw_line(axis, records, np.where(known, values, np.nan), key)
        axis.vlines(
            steps[known], (values - margin)[known], (values + margin)[known], color=COLORS[key],
            alpha=0.35, lw=4,
        )  # fmt: skip
        unknown = np.isfinite(values) & ~known
        if unknown.any():
            axis.plot(steps[unknown], values[unknown], "o", ms=5, mfc="none", color=COLORS[key])
            hollow = True
    if hollow:
        axis.plot([], [], "o", ms=5, mfc="none", color=INK, label="error unknown")
    label_axis(axis, "trace of F ± 2 standard errors", upright=True)
    make_steps(axis)
    _center_single(axis, records)
    return add_legend(figure, axis)


def draw_error_map(records: Sequence[Record]) -> Figure | None:
    """Draw layer × step heat maps of the relative errors of Î₁ and Î₂ on one colour scale."""
    shown = subsample(records, MAX_COLUMNS)
    layers = list(dict.fromkeys(name for record in shown for name in record["layers"]))
    grids = {key: _error_grid(shown, layers, key) for key in LAYER_KEYS}
    columns = {key: int(np.isfinite(grid).any(0).sum()) for key, grid in grids.items()}
    # an estimator measured once, beside one measured often, would be an empty panel
    least = min(2, max(columns.values()))
    grids = {key: grid for key, grid in grids.items() if columns[key] >= max(least, 1)}
    if not grids:
        return None
    figure, axes = make_panels(len(layers), len(grids))
    draw_grids(figure, axes, list(grids.values()), [record["step"] for record in shown])
    name_panels(axes, [SYMBOLS[key] for key in grids])
    labels = label_layers(shown[-1])
    name_rows(axes[0], [labels.get(name, name) for name in layers])
    if any(np.isnan(grid).any() for grid in grids.values()):
        axes[0].plot([], [], "s", ms=8, color=GREY, label="unknown")
        add_legend(figure, axes[0])
    return figure


def draw_needs(record: Record) -> Figure | None:
    """Draw the (input, label) pairs of each layer for 10 % error, next to the number measured."""
    layers = shown_layers(record)
    pairs = {key: _column(layers, key, "pairs_for_10_percent") for key in LAYER_KEYS}
    pairs = {key: np.maximum(v, 1.0) for key, v in pairs.items() if np.isfinite(v).any()}
    if not pairs:
        return None
    figure, (axis,) = make_panels(len(layers), 1)
    rows = np.arange(len(layers))
    for key, values in pairs.items():
        axis.scatter(
            values, rows, s=26, c=COLORS[key], marker=MARKERS[key], label=SYMBOLS[key], zorder=3,
            alpha=0.85,
        )  # fmt: skip
    inputs = record["batch_size"]
    axis.axvline(inputs, color=INK, ls="--", lw=1.5, label=f"{inputs:,} pairs: 1 label per input")
    make_logarithmic(axis)
    name_rows(axis, label_rows(record, layers))
    return add_legend(figure, axis)


def draw_bounds(record: Record) -> Figure | None:
    """Draw ‖Cov‖_F and its bound (17), (18) in each layer; for drawn labels L and its bound."""
    exact = record["draws"] == "exact"
    fields = ("covariance_norm", "bound") if exact else ("total_label_variance", "trace_bound")
    layers = shown_layers(record)
    ends = {key: [_column(layers, key, field) for field in fields] for key in LAYER_KEYS}
    ends = {key: pair for key, pair in ends.items() if np.isfinite(pair).all(0).any()}
    if not ends:
        return None
    figure, axes = make_panels(len(layers), len(ends))
    rows = np.arange(len(layers))
    for axis, (key, (measured, bounds)) in zip(axes, ends.items(), strict=True):
        axis.hlines(rows, measured, bounds, color=INK, alpha=0.3, lw=1.5)
        axis.plot(measured, rows, "o", ms=5, color=COLORS[key])
        axis.plot(bounds, rows, "|", ms=9, mew=2, color=INK, label="bound")
        make_logarithmic(axis)
    axes[0].plot([], [], "o", ms=5, color=INK, label="measured")
    name_panels(axes, [SYMBOLS[key] for key in ends])
    name_rows(axes[0], label_rows(record, layers))
    return add_legend(figure, axes[0])


def draw_errors_by_confidence(records: Sequence[Record]) -> Figure | None:
    """Draw the errors with one label against the trace of the output Fisher, where that changes."""
    traces = np.array([(r.get("outputs") or {}).get("fisher_trace") for r in records], dtype=float)
    errors = {key: _errors(records, key) for key in UNBIASED_KEYS}
    errors = {key: values for key, values in errors.items() if _has_trend(traces, values)}
    if not errors:
        return None
    figure, axis = make_chart()
    for key, values in errors.items():
        label = f"1 label: {SYMBOLS[key]}"
        axis.scatter(traces, values, s=22, c=COLORS[key], marker=MARKERS[key], label=label)
    _draw_noise(axis)
    return _finish_errors(
        figure, axis, "trace of the output Fisher: confident to the right", make_falling
    )


def draw_convergence(record: Record) -> Figure | None:
    """Draw the error of the trace by Î₁ against the number of inputs, measured and predicted."""
    points = [(n, error) for n, error in record.get("convergence") or [] if error > 0]
    estimate = record["total"]["i1"]
    if len(points) < 2 or not estimate.get("std_error") or not estimate.get("trace"):
        return None
    figure, axis = make_chart()
    sizes, errors = np.array(points, dtype=float).T
    size, final = record["batch_size"], estimate["std_error"] / estimate["trace"]
    line = np.array([1.0, 100.0 * size])
    axis.scatter(sizes, errors, s=26, c=BLUE, label="groups of inputs", zorder=3)
    axis.scatter([size], [final], s=40, c=INK, marker="s", label="trace, this report", zorder=3)
    axis.plot(line, final * (size / line) ** 0.5, "--", color=INK, lw=1.5, label="falls as 1/√inputs")
    axis.axhline(0.1, color=INK, ls=":", lw=1, alpha=0.6)
    return _finish_errors(figure, axis, "inputs", make_logarithmic)


def draw_diagonal(record: Record) -> Figure | None:
    """Draw the histogram of the entries of diag F by Î₁.

    A record without their sizes (an old one, or of a sharded model) gives the mean entry of each
    parameter tensor instead, weighted by the size of the tensor.
    """
    if record.get("sizes") and record["total"]["i1"]["trace"] is not None:
        figure, axis = make_chart()
        logs, numbers = np.array(record["sizes"], dtype=float).T
        lower, upper = 10.0**logs, 10.0 ** (logs + STEP)
        axis.bar(lower, numbers, width=upper - lower, align="edge", color=BLUE)
        _label_sizes(axis, "entry of the diagonal of F, by Î₁")
        return figure
    means = {key: _mean_entries(record, key) for key in LAYER_KEYS}
    means = {key: pair for key, pair in means.items() if pair[0].size}
    if not means:
        return None
    figure, axis = make_chart()
    values = np.concatenate([logs for logs, _ in means.values()])
    edges = np.linspace(np.floor(values.min()), np.ceil(values.max()) + 1e-9, 31)
    for key, (logs, weights) in means.items():
        counts, _ = np.histogram(logs, edges, weights=weights)
        axis.stairs(
            counts, 10.0**edges, color=COLORS[key], linewidth=2, label=SYMBOLS[key],
            linestyle=STYLES[key],
        )  # fmt: skip
    _label_sizes(axis, "mean entry of each parameter tensor's diagonal of F")
    return add_legend(figure, axis)


def _draw_line(
    axis: Axes, records: Sequence[Record], values: np.ndarray, key: str, width: float = 1.5
) -> None:
    """Draw an estimator's values over steps; a later estimator leaves an earlier one visible."""
    later = key != "i1"
    size = (8.0 if len(records) == 1 else 5.0) * (0.7 if later else 1.0)
    axis.plot(
        [record["step"] for record in records], values, marker=MARKERS[key], ms=size,
        lw=width * (0.6 if later else 1.0), color=COLORS[key], label=SYMBOLS[key],
    )  # fmt: skip


def _draw_noise(axis: Axes) -> None:
    """Draw the error from which on an estimate is noise."""
    axis.axhline(1, color=INK, ls=":", lw=1, alpha=0.6)


def _has_trend(traces: np.ndarray, errors: np.ndarray) -> bool:
    """Return whether enough errors are known at traces that differ enough.

    Args:
        traces: Traces of the output Fisher [records].
        errors: Errors of an estimator [records].
    """
    known = traces[(errors > 0) & (traces > 0)]
    return known.size >= MIN_POINTS and known.max() > MIN_CHANGE * known.min()


def _center_single(axis: Axes, records: Sequence[Record]) -> None:
    """Show a single report as a point in the middle, with its step."""
    if len(records) == 1:
        step = records[0]["step"]
        axis.set_xlim(step - 1, step + 1)
        axis.set_xticks([step], [f"{step:,}"])


def _finish_errors(
    figure: Figure, axis: Axes, quantity: str, set_scale: Callable[[Axes], None]
) -> Figure:
    """Return a chart of errors with its scales, the horizontal label and a legend."""
    make_shares(axis)
    set_scale(axis)
    label_axis(axis, quantity)
    return add_legend(figure, axis)


def _positive(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """Return values as floats, NaN where they are unknown or not positive."""
    array = np.array(values, dtype=float)
    array[~(array > 0)] = np.nan
    return array


def _errors(records: Sequence[Record], key: str) -> np.ndarray:
    """Return the errors of the whole model with one label for each input of the last report."""
    return _positive([_one_label_error(r["total"], key, r, records[-1]) for r in records])


def _error_grid(records: Sequence[Record], layers: Sequence[str], key: str) -> np.ndarray:
    """Return the errors with one label for each input of the last report [layers, records]."""
    rows = [
        _positive([_one_label_error(r["layers"].get(name, {}), key, r, records[-1]) for r in records])
        for name in layers
    ]
    return np.array(rows).reshape(len(layers), len(records))


def _one_label_error(group: Record, key: str, record: Record, last: Record) -> float | None:
    """Return the error of a group of ``record`` with one label for each input of the last report."""
    inputs = record["batch_size"]
    return error_with_drawn_labels(group.get(key, {}), inputs, at=last["batch_size"])


def _series(records: Sequence[Record], key: str, field: str) -> np.ndarray:
    """Return a value of the whole model over records, NaN where it is unknown [records]."""
    return np.array([r["total"].get(key, {}).get(field) for r in records], dtype=float)


def _column(layers: Sequence[tuple[str, Record]], key: str, field: str) -> np.ndarray:
    """Return a value of every layer, NaN where it is unknown or not positive [layers]."""
    if field == "pairs_for_10_percent":
        return _positive([pairs_needed(group.get(key, {})) for _, group in layers])
    return _positive(read_layers(layers, key, field))


def _label_sizes(axis: Axes, quantity: str) -> None:
    make_logarithmic(axis, upright=True)
    label_axis(axis, "entries", upright=True)
    label_axis(axis, quantity)
    make_logarithmic(axis)


def _mean_entries(record: Record, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return log10 of the positive mean entries of diag F̂ by parameter tensor, and their sizes."""
    groups = [
        group
        for group in record.get("parameters", {}).values()
        if (group.get(key, {}).get("trace") or 0) > 0
    ]
    logs = np.log10([group[key]["trace"] / group["numel"] for group in groups])
    return logs, np.array([float(group["numel"]) for group in groups])
