"""The chart of the paper's point: how the variance from labels of Î₁ and of Î₂ differ by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fimprobe.estimators.names import SYMBOLS
from fimprobe.plots.layers import label_rows, shown_layers
from fimprobe.plots.style import (
    COLORS,
    INK,
    MARKERS,
    Axes,
    Figure,
    add_legend,
    label_axis,
    make_logarithmic,
    make_panels,
    name_rows,
)
from fimprobe.report.record import Record

SHIFTS = {"i1": -0.2, "i2": 0.2}
"""Place of each estimator beside the row of its layer."""


def draw_label_variances(records: Sequence[Record], last: Record) -> Figure | None:
    """Draw V1 and V2 of each layer, from the first report to the last, ± 2 standard errors.

    Args:
        records: All records of the run, or the condensed ones.
        last: The whole record of the last report.

    Returns:
        None unless both estimators have a variance.
    """
    layers = shown_layers(last)
    values = {key: [_of(group, key) for _, group in layers] for key in SHIFTS}
    if not all(any(value is not None for value, _ in column) for column in values.values()):
        return None
    positive = [value for column in values.values() for value, _ in column if value]
    if not positive:
        return None
    figure, (axis,) = make_panels(len(layers), 1)
    starts = {
        key: [_of(records[0]["layers"].get(name, {}), key)[0] for name, _ in layers] for key in SHIFTS
    }
    seen = positive + [start for column in starts.values() for start in column if start]
    floor = min(seen) / 5
    for key, shift in SHIFTS.items():
        rows = np.arange(len(layers)) + shift
        _draw_estimator(axis, key, rows, values[key], starts[key], floor)
    axis.plot([], [], "|", color=INK, ms=9, mew=2, label="none")
    make_logarithmic(axis)
    axis.set_xlim(floor, 3 * max(seen))
    label_axis(axis, "label variance; faint: since the first report")
    name_rows(axis, label_rows(last, layers))
    return add_legend(figure, axis)


def _draw_estimator(
    axis: Axes,
    key: str,
    rows: np.ndarray,
    values: Sequence[tuple[float | None, float | None]],
    starts: Sequence[float | None],
    floor: float,
) -> None:
    """Draw one estimator's variances.

    Args:
        axis: The panel.
        key: The estimator.
        rows: The place of each layer.
        values: Variance and standard error of each layer in the last report.
        starts: Variance in the first report.
        floor: The left end of the axis, where exact ones stand.
    """
    known = [i for i, (value, _) in enumerate(values) if value]
    x = np.array([values[i][0] for i in known], dtype=float)
    errors = 2 * np.array([values[i][1] or 0.0 for i in known], dtype=float)
    # an error bar that reaches zero ends at the left end of a logarithmic axis
    below = np.minimum(errors, x - floor)
    axis.errorbar(
        x, rows[known], xerr=np.array([below, errors]), fmt=MARKERS[key], ms=5, lw=1.2,
        color=COLORS[key], label=SYMBOLS[key],
    )  # fmt: skip
    for i, row in enumerate(rows):
        start, end = starts[i], values[i][0]
        if start and end:
            axis.plot([start, end], [row, row], color=COLORS[key], alpha=0.3, lw=2.5)
    exact = [i for i, (value, _) in enumerate(values) if value == 0]
    axis.plot(np.full(len(exact), floor), rows[exact], "|", color=COLORS[key], ms=9, mew=3)


def _of(group: Record, key: str) -> tuple[float | None, float | None]:
    """Return the variance from labels of a layer and its standard error."""
    estimate = group.get(key, {})
    return estimate.get("label_variance"), estimate.get("label_variance_error")
