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
from fimprobe.plots.layers import label_rows, shown_layers
from fimprobe.plots.style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    MARKERS,
    ORANGE,
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


def draw_errors(records: Sequence[Record]) -> Figure | None:
    """Draw the errors of the whole model over steps, on a logarithmic scale.

    The error of each report, and those of the estimators with one label for each input.
    """
    errors = {key: _errors(records, key) for key in UNBIASED_KEYS}
    errors = {key: values for key, values in errors.items() if (values > 0).any()}
    reported = _positive(list(_series(records, "i1", "rel_error")))
    if not errors and not (reported > 0).any():
        return None
    figure, axis = make_chart()
    for key, values in errors.items():
        _draw_line(axis, records, values, key, label=f"1 label: {SYMBOLS[key]}")
    if (reported > 0).any():
        axis.plot(
            [record["step"] for record in records], reported, color=INK, marker="s", lw=1.2,
            ms=3 if len(records) > 1 else 8, alpha=0.8, zorder=1.9, label="this report",
        )  # fmt: skip
    axis.axhline(1, color=INK, ls="--", lw=1, alpha=0.5)
    make_steps(axis, shares=True)
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
        _draw_line(axis, records, values, key, marked=np.isfinite(margin))
        axis.fill_between(
            steps, values - margin, values + margin, color=COLORS[key], alpha=0.18, lw=0
        )
        if len(records) == 1:  # a band would have no width
            axis.errorbar(steps, values, margin, fmt="none", capsize=8, color=COLORS[key])
        unknown = np.isfinite(values) & ~np.isfinite(margin)
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
    grids = {key: grid for key, grid in grids.items() if np.isfinite(grid).any()}
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


def draw_variances(record: Record) -> Figure | None:
    """Draw the variance of one pair in each layer, from labels and from inputs, and its bound."""
    layers = shown_layers(record)
    fields = ("label_variance", "input_variance", "diagonal_bound")
    columns = {key: [_column(layers, key, field) for field in fields] for key in LAYER_KEYS}
    columns = {
        key: values
        for key, values in columns.items()
        if any(np.isfinite(variance).any() for variance in values[:2])
    }
    if not columns:
        return None
    figure, axes = make_panels(len(layers), len(columns))
    rows = np.arange(len(layers))
    # one scale for all panels, which are to be compared
    variances = [v for values in columns.values() for v in values[:2] if (v > 0).any()]
    floor = min(np.nanmin(v) for v in variances) / 3
    highest = max(np.nanmax(v) for values in columns.values() for v in values if (v > 0).any())
    for axis, (labels, inputs, bounds) in zip(axes, columns.values(), strict=True):
        for values, shift, color, label in (
            (labels, -0.2, BLUE, "from labels"),
            (inputs, 0.2, ORANGE, "from inputs"),
        ):
            axis.barh(rows + shift, values - floor, left=floor, height=0.36, color=color, label=label)
        if np.isfinite(bounds).any():
            axis.plot(bounds, rows - 0.2, "|", ms=9, mew=2, color=INK, label="bound on labels' part")
        label_axis(axis, "no bar: none, or unknown")
        make_logarithmic(axis)
        axis.set_xlim(floor, 2 * highest)
    name_panels(axes, [SYMBOLS[key] for key in columns])
    name_rows(axes[0], label_rows(record, layers))
    return add_legend(figure, axes[0])


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
        axis.plot(measured, rows, "o", ms=5, color=COLORS[key], label="measured")
        axis.plot(bounds, rows, "|", ms=9, mew=2, color=INK, label="bound")
        make_logarithmic(axis)
    name_panels(axes, [SYMBOLS[key] for key in ends])
    name_rows(axes[0], label_rows(record, layers))
    return add_legend(figure, axes[0])


def draw_errors_by_confidence(records: Sequence[Record]) -> Figure | None:
    """Draw the errors with one label against the trace of the output Fisher, logarithmic."""
    traces = np.array([(r.get("outputs") or {}).get("fisher_trace") for r in records], dtype=float)
    errors = {key: _errors(records, key) for key in UNBIASED_KEYS}
    errors = {k: v for k, v in errors.items() if ((v > 0) & (traces > 0)).sum() > 1}
    if not errors:
        return None
    figure, axis = make_chart()
    for key, values in errors.items():
        label = f"1 label: {SYMBOLS[key]}"
        axis.scatter(traces, values, s=22, c=COLORS[key], marker=MARKERS[key], label=label)
    axis.axhline(1, color=INK, ls="--", lw=1, alpha=0.5)
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
    axis.scatter([size], [final], s=40, c=ORANGE, marker="D", label="all of them", zorder=3)
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
    axis: Axes,
    records: Sequence[Record],
    values: np.ndarray,
    key: str,
    marked: np.ndarray | None = None,
    label: str = "",
) -> None:
    """Draw an estimator's values over steps, with marks where ``marked`` [records]."""
    steps = [record["step"] for record in records]
    every = None if marked is None else list(np.flatnonzero(marked))
    axis.plot(
        steps, values, STYLES[key], marker="o", ms=3 if len(records) > 1 else 8, color=COLORS[key],
        label=label or SYMBOLS[key], markevery=every,
    )  # fmt: skip


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


def _positive(values: Sequence[float | None]) -> np.ndarray:
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
    estimates = [group.get(key, {}) for _, group in layers]
    if field == "pairs_for_10_percent":
        return _positive([pairs_needed(estimate) for estimate in estimates])
    return _positive([estimate.get(field) for estimate in estimates])


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
