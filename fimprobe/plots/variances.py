"""The charts of the variance of one (input, label) pair, by layer.

One compares its parts from labels and from inputs, the other the labels' part of Î₁ and of Î₂, which
is the paper's point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS
from fimprobe.plots.layers import label_rows, read_layers, shown_layers
from fimprobe.plots.style import (
    COLORS,
    GREY,
    INK,
    MARKERS,
    Axes,
    Figure,
    add_legend,
    label_axis,
    make_logarithmic,
    make_panels,
    name_panels,
    name_rows,
)
from fimprobe.report.record import Record

PURPLE, OLIVE = "#AA4499", "#999933"
"""Colours of Tol for labels and inputs: blue, orange and green are those of the estimators."""

SHIFTS = {"i1": -0.2, "i2": 0.2}
"""Place of each estimator beside the row of its layer."""

LONGEST_BAR = 10.0
"""How far an error bar goes down at most: one that reaches 0 has no end on a logarithmic axis."""


def draw_variances(record: Record) -> Figure | None:
    """Draw the variance of one pair in each layer, from labels and from inputs, and its bound."""
    layers = shown_layers(record)
    fields = ("label_variance", "input_variance", "diagonal_bound")
    columns = {key: [read_layers(layers, key, field) for field in fields] for key in LAYER_KEYS}
    columns = {
        key: values
        for key, values in columns.items()
        if any(np.isfinite(variance).any() for variance in values[:2])
    }
    positive = [v[v > 0] for values in columns.values() for v in values[:2]]
    if not any(v.size for v in positive):
        return None
    figure, axes = make_panels(len(layers), len(columns))
    rows = np.arange(len(layers))
    # one scale for all panels, which are to be compared
    floor = min(v.min() for v in positive if v.size) / 3
    highest = max(v[v > 0].max() for values in columns.values() for v in values if (v > 0).any())
    missing: list[np.ndarray] = []
    for axis, (labels, inputs, bounds) in zip(axes, columns.values(), strict=True):
        for values, shift, color, label in (
            (labels, -0.2, PURPLE, "from labels"),
            (inputs, 0.2, OLIVE, "from inputs"),
        ):
            lengths = np.where(values > 0, values, np.nan) - floor
            axis.barh(rows + shift, lengths, left=floor, height=0.36, color=color, label=label)
            _mark_missing(axis, values, rows + shift, color, "s")
            missing.append(values)
        if (bounds > 0).any():
            axis.plot(bounds, rows - 0.2, "|", ms=9, mew=2, color=INK, label="bound")
        make_logarithmic(axis)
        axis.set_xlim(floor, 2 * highest)
    name_panels(axes, [SYMBOLS[key] for key in columns])
    name_rows(axes[0], label_rows(record, layers))
    _explain_missing(axes[0], np.concatenate(missing), "s")
    return add_legend(figure, axes[0])


def draw_label_variances(records: Sequence[Record], last: Record) -> Figure | None:
    """Draw V1 and V2 of each layer, from the first report to the last, ± 2 standard errors.

    Args:
        records: All records of the run, or the condensed ones.
        last: The whole record of the last report.

    Returns:
        None unless both estimators have a variance.
    """
    layers = shown_layers(last)
    values = {key: read_layers(layers, key, "label_variance") for key in SHIFTS}
    if not all(np.isfinite(column).any() for column in values.values()):
        return None
    if not any((column > 0).any() for column in values.values()):
        return None
    figure, (axis,) = make_panels(len(layers), 1)
    first = [(name, records[0]["layers"].get(name, {})) for name, _ in layers]
    ends = [column[column > 0] for column in values.values()]
    for key, shift in SHIFTS.items():
        rows = np.arange(len(layers)) + shift
        errors = 2 * np.nan_to_num(read_layers(layers, key, "label_variance_error"))
        ends += _draw_estimator(axis, key, rows, values[key], errors)
        _mark_missing(axis, values[key], rows, COLORS[key], MARKERS[key])
        if records[0]["step"] != last["step"]:
            starts = read_layers(first, key, "label_variance")
            both = (starts > 0) & (values[key] > 0)
            axis.hlines(
                rows[both], starts[both], values[key][both], color=COLORS[key], alpha=0.3, lw=2.5
            )
            ends.append(starts[both])
    make_logarithmic(axis)
    seen = np.concatenate(ends)
    axis.set_xlim(seen.min() / 3, 3 * seen.max())
    since = "; faint: since the first report" if records[0]["step"] != last["step"] else ""
    label_axis(axis, f"label variance{since}")
    name_rows(axis, label_rows(last, layers))
    _explain_missing(axis, np.concatenate(list(values.values())), "o")
    return add_legend(figure, axis)


def _draw_estimator(
    axis: Axes, key: str, rows: np.ndarray, values: np.ndarray, errors: np.ndarray
) -> list[np.ndarray]:
    """Draw the positive variances of one estimator, and return the lower ends of their bars.

    Args:
        axis: The panel.
        key: The estimator.
        rows: The place of each layer.
        values: The variance of each layer.
        errors: Two standard errors of each.
    """
    known = values > 0
    rows, values, errors = rows[known], values[known], errors[known]
    ends = values - errors
    cut = ends < values / LONGEST_BAR
    ends[cut] = values[cut] / LONGEST_BAR
    axis.errorbar(
        values, rows, xerr=np.array([values - ends, errors]), fmt=MARKERS[key], ms=5, lw=1.2,
        color=COLORS[key], label=SYMBOLS[key],
    )  # fmt: skip
    if cut.any():
        axis.plot(ends[cut], rows[cut], "<", ms=4, color=COLORS[key])
    return [ends]


def _mark_missing(axis: Axes, values: np.ndarray, rows: np.ndarray, color: str, marker: str) -> None:
    """Mark at the left edge the rows that have no place on a logarithmic axis.

    Args:
        axis: The panel.
        values: The variance of each row; NaN where unknown.
        rows: The place of each row.
        color: The colour of those that are 0, whose marks are empty.
        marker: Their shape.
    """
    edge: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "clip_on": False}
    none, unknown = rows[values <= 0], rows[np.isnan(values)]
    if none.size:
        axis.plot(np.zeros(none.size), none, marker, mfc="none", mec=color, ms=5, **edge)
    if unknown.size:
        axis.plot(np.zeros(unknown.size), unknown, "x", mec=GREY, ms=5, mew=1.5, **edge)


def _explain_missing(axis: Axes, values: np.ndarray, marker: str) -> None:
    """Name in the legend the marks of ``_mark_missing`` that are drawn.

    Args:
        axis: The panel of the legend.
        values: All variances of the figure.
        marker: The shape of those that are 0.
    """
    if (values <= 0).any():
        axis.plot([], [], marker, mfc="none", mec=INK, ms=5, label="none")
    if np.isnan(values).any():
        axis.plot([], [], "x", mec=GREY, ms=5, mew=1.5, label="unknown")
