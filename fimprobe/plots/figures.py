"""Pictures of a run: from records (as ``Report.to_dict`` gives them) to figures.

TensorBoard and the HTML page show the same ones. Every function returns None where the records hold
nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fimprobe.estimators.diagonal_histogram import STEP
from fimprobe.plots.history import MOST_COLUMNS, Record
from fimprobe.plots.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    TEXT,
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
from fimprobe.report.table import need_of, one_label_error, rank_layers

NAMES = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H"}
COLORS = {"i1": BLUE, "i2": ORANGE, "ih": GREEN}
STYLES = {"i1": "-", "i2": "--", "ih": ":"}  # lines may lie on each other
MARKERS = {"i1": "o", "i2": "D"}

MOST_ROWS = 30
"""Layers with bars, each of which is to be named."""


def draw_errors(records: Sequence[Record]) -> Figure | None:
    """Relative errors of the whole model's estimators over steps, on a logarithmic scale."""
    found = {kind: _errors(records, kind) for kind in NAMES}
    found = {kind: values for kind, values in found.items() if (values > 0).any()}
    if not found:
        return None
    figure, axis = make_chart()
    for kind, values in found.items():
        _line(axis, records, values, kind)
    axis.axhline(1, color=INK, ls="--", lw=1, alpha=0.5)
    make_steps(axis, shares=True)
    return add_legend(figure, axis)


def draw_traces(records: Sequence[Record]) -> Figure | None:
    """Traces over steps with ± 2 standard errors; hollow points where these are not known."""
    found = {kind: _series(records, kind, "trace") for kind in NAMES}
    found = {kind: values for kind, values in found.items() if np.isfinite(values).any()}
    if not found:
        return None
    figure, axis = make_chart()
    for kind, values in found.items():
        wide = 2 * _series(records, kind, "std_error")
        steps = np.array([r["step"] for r in records])
        _line(axis, records, values, kind, marked=np.isfinite(wide))
        axis.fill_between(steps, values - wide, values + wide, color=COLORS[kind], alpha=0.18, lw=0)
        vague = np.isfinite(values) & ~np.isfinite(wide)
        if vague.any():
            axis.plot(steps[vague], values[vague], "o", ms=5, mfc="none", color=COLORS[kind])
    label_axis(axis, "trace of F", upright=True)
    make_steps(axis)
    return add_legend(figure, axis)


def draw_error_map(records: Sequence[Record]) -> Figure | None:
    """Layer × step heat maps of the relative errors of Î₁ and Î₂, one scale of colours."""
    shown = subsample(records, MOST_COLUMNS)
    layers = list(dict.fromkeys(name for record in shown for name in record["layers"]))
    found = {}
    for kind in ("i1", "i2"):
        rows = [
            [
                one_label_error(record["layers"].get(name, {}).get(kind, {}), record["batch_size"])
                for record in shown
            ]
            for name in layers
        ]
        grid = np.array(rows, dtype=float).reshape(len(layers), len(shown))
        grid[~(grid > 0)] = np.nan
        if np.isfinite(grid).any():
            found[kind] = grid
    if not found:
        return None
    figure, axes = make_panels(len(layers), len(found))
    draw_grids(figure, axes, list(found.values()), [record["step"] for record in shown])
    name_panels(axes, [NAMES[kind] for kind in found])
    name_rows(axes[0], layers)
    return figure


def draw_variances(record: Record) -> Figure | None:
    """Bars of a layer's variance of one pair, from labels and from inputs, and the labels' bound."""
    layers = shown_layers(record)
    names = ("label_variance", "input_variance")
    kinds = [k for k in ("i1", "i2") if any(np.isfinite(_column(layers, k, n)).any() for n in names)]
    if not kinds:
        return None
    figure, axes = make_panels(len(layers), len(kinds))
    rows = np.arange(len(layers))
    columns = {k: [_column(layers, k, n) for n in (*names, "diagonal_bound")] for k in kinds}
    # the estimators are to be compared: one scale
    floor = min(np.nanmin(v) for both in columns.values() for v in both[:2] if (v > 0).any()) / 3
    highest = max(np.nanmax(v) for all in columns.values() for v in all if (v > 0).any())
    for axis, (labels, inputs, bounds) in zip(axes, columns.values(), strict=True):
        for values, shift, color, label in (
            (labels, -0.2, BLUE, "from labels"),
            (inputs, 0.2, ORANGE, "from inputs"),
        ):
            axis.barh(rows + shift, values - floor, left=floor, height=0.36, color=color, label=label)
        if np.isfinite(bounds).any():
            axis.plot(bounds, rows - 0.2, "|", ms=9, mew=2, color=INK, label="labels' bound")
        label_axis(axis, "no bar: none, or unknown")
        make_logarithmic(axis)
        axis.set_xlim(floor, 2 * highest)
    name_panels(axes, [NAMES[kind] for kind in kinds])
    name_rows(axes[0], [name for name, _ in layers])
    return add_legend(figure, axes[0])


def draw_needs(record: Record) -> Figure | None:
    """(input, label) pairs for a relative error of 10 %, by layer, against those measured."""
    layers = shown_layers(record)
    found = {kind: _column(layers, kind, "pairs_for_10_percent") for kind in ("i1", "i2")}
    found = {kind: np.maximum(v, 1.0) for kind, v in found.items() if np.isfinite(v).any()}
    if not found:
        return None
    figure, (axis,) = make_panels(len(layers), 1)
    rows = np.arange(len(layers))
    for kind, needs in found.items():
        axis.scatter(
            needs, rows, s=26, c=COLORS[kind], marker=MARKERS[kind], label=NAMES[kind], zorder=3,
            alpha=0.85,
        )  # fmt: skip
    inputs = record["batch_size"]
    axis.axvline(inputs, color=INK, ls="--", lw=1.5, label=f"{inputs:,}: 1 label for each input here")
    make_logarithmic(axis)
    name_rows(axis, [name for name, _ in layers])
    return add_legend(figure, axis)


def draw_bounds(record: Record) -> Figure | None:
    """‖Cov‖_F beside (17), (18); where labels were drawn, L beside the bound on it."""
    exact = record["draws"] == "exact"
    names = ("covariance_norm", "bound") if exact else ("total_label_variance", "trace_bound")
    layers = shown_layers(record)
    found = {kind: [_column(layers, kind, name) for name in names] for kind in ("i1", "i2")}
    found = {k: ends for k, ends in found.items() if np.isfinite(ends).all(0).any()}
    if not found:
        return None
    figure, axes = make_panels(len(layers), len(found))
    rows = np.arange(len(layers))
    for axis, (kind, (measured, bounds)) in zip(axes, found.items(), strict=True):
        axis.hlines(rows, measured, bounds, color=INK, alpha=0.3, lw=1.5)
        axis.plot(measured, rows, "o", ms=5, color=COLORS[kind], label="measured")
        axis.plot(bounds, rows, "|", ms=9, mew=2, color=INK, label="bound")
        make_logarithmic(axis)
    name_panels(axes, [NAMES[kind] for kind in found])
    name_rows(axes[0], [name for name, _ in layers])
    return add_legend(figure, axes[0])


def draw_errors_by_confidence(records: Sequence[Record]) -> Figure | None:
    """Relative errors with one label for each input, against tr I(h): both axes logarithmic."""
    sure = np.array([(r.get("outputs") or {}).get("fisher_trace") for r in records], dtype=float)
    found = {kind: _errors(records, kind) for kind in NAMES}
    found = {k: v for k, v in found.items() if ((v > 0) & (sure > 0)).sum() > 1}
    if not found:
        return None
    figure, axis = make_chart()
    for kind, values in found.items():
        axis.scatter(
            sure, values, s=22, c=COLORS[kind], marker=MARKERS.get(kind, "^"), label=NAMES[kind]
        )
    axis.axhline(1, color=INK, ls="--", lw=1, alpha=0.5)
    make_shares(axis)
    make_falling(axis)
    label_axis(axis, "tr I(h) of the outputs: confident to the right")
    return add_legend(figure, axis)


def draw_convergence(record: Record) -> Figure | None:
    """Error of the trace by Î₁ against the number of inputs, measured and predicted."""
    points = [(n, error) for n, error in record.get("convergence") or [] if error > 0]
    e = record["total"]["i1"]
    if len(points) < 2 or not e.get("std_error") or not e.get("trace"):
        return None
    figure, axis = make_chart()
    sizes, errors = np.array(points, dtype=float).T
    size, final = record["batch_size"], e["std_error"] / e["trace"]
    line = np.array([1.0, 100.0 * size])
    axis.scatter(sizes, errors, s=26, c=BLUE, label="groups of inputs", zorder=3)
    axis.scatter([size], [final], s=40, c=ORANGE, marker="D", label="all of them", zorder=3)
    axis.plot(line, final * (size / line) ** 0.5, "--", color=INK, lw=1.5, label="∝ 1/√inputs")
    axis.axhline(0.1, color=INK, ls=":", lw=1, alpha=0.6)
    make_shares(axis)
    make_logarithmic(axis)
    label_axis(axis, "inputs")
    return add_legend(figure, axis)


def draw_diagonal(record: Record) -> Figure | None:
    """How large the entries of diag F are, by Î₁.

    Of records without their sizes (old ones, sharded models): each parameter tensor's mean, counted
    by its size.
    """
    if record.get("sizes") and record["total"]["i1"]["trace"] is not None:
        figure, axis = make_chart()
        logs, numbers = np.array(record["sizes"], dtype=float).T
        lower, upper = 10.0**logs, 10.0 ** (logs + STEP)
        axis.bar(lower, numbers, width=upper - lower, align="edge", color=BLUE)
        _name_sizes(axis, "entry of diag F by Î₁")
        return figure
    found = {kind: _sizes(record, kind) for kind in ("i1", "i2")}
    found = {kind: pair for kind, pair in found.items() if pair[0].size}
    if not found:
        return None
    figure, axis = make_chart()
    values = np.concatenate([values for values, _ in found.values()])
    edges = np.linspace(np.floor(values.min()), np.ceil(values.max()) + 1e-9, 31)
    for kind, (logs, weights) in found.items():
        counts, _ = np.histogram(logs, edges, weights=weights)
        axis.stairs(
            counts, 10.0**edges, color=COLORS[kind], linewidth=2, label=NAMES[kind],
            linestyle=STYLES[kind],
        )  # fmt: skip
    _name_sizes(axis, "mean entry of diag F of each parameter tensor")
    return add_legend(figure, axis)


def shown_layers(record: Record) -> list[tuple[str, Record]]:
    """At most ``MOST_ROWS`` layers, those that need most pairs, in the order of the model."""
    chosen = {name for name, _ in rank_layers(record, MOST_ROWS)}
    return [(name, group) for name, group in record["layers"].items() if name in chosen]


# -- parts ---------------------------------------------------------------------------------


def _line(
    axis: Axes,
    records: Sequence[Record],
    values: np.ndarray,
    kind: str,
    marked: np.ndarray | None = None,
) -> None:
    steps = [record["step"] for record in records]
    every = None if marked is None else list(np.flatnonzero(marked))
    axis.plot(
        steps, values, STYLES[kind], marker="o", ms=3, color=COLORS[kind], label=NAMES[kind],
        markevery=every,
    )  # fmt: skip


def _errors(records: Sequence[Record], kind: str) -> np.ndarray:
    """Relative errors of the whole model with one label for each input, NaN where not above 0."""
    found = [one_label_error(r["total"].get(kind, {}), r["batch_size"]) for r in records]
    errors = np.array(found, dtype=float)
    errors[~(errors > 0)] = np.nan
    return errors


def _series(records: Sequence[Record], kind: str, name: str) -> np.ndarray:
    """A value of the whole model over records, NaN where it is not known."""
    return np.array([r["total"].get(kind, {}).get(name) for r in records], dtype=float)


def _column(layers: Sequence[tuple[str, Record]], kind: str, name: str) -> np.ndarray:
    """A value of every layer, NaN where there is none above zero."""
    estimates = [group.get(kind, {}) for _, group in layers]
    need = name == "pairs_for_10_percent"
    values = [need_of(e) if need else e.get(name) for e in estimates]
    column = np.array(values, dtype=float)
    column[~(column > 0)] = np.nan
    return column


def _name_sizes(axis: Axes, what: str) -> None:
    axis.set_yscale("log")
    label_axis(axis, "entries", upright=True)
    label_axis(axis, what)
    make_logarithmic(axis)
    axis.tick_params(labelsize=TEXT)


def _sizes(record: Record, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """log10 of each parameter tensor's mean entry of diag F̂, where above 0, and its number."""
    known = record.get("parameters", {}).values()
    groups = [g for g in known if (g.get(kind, {}).get("trace") or 0) > 0]
    logs = np.log10([group[kind]["trace"] / group["numel"] for group in groups])
    return logs, np.array([float(group["numel"]) for group in groups])
