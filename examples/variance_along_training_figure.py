"""The measurements of ``examples/variance_along_training.py``, and their figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LAYERS = 4


class Layer(NamedTuple):
    """The diagonals of one layer, summed over its parameters and averaged over the inputs."""

    trace: float
    """tr F."""
    norm: float
    """‖diag F‖₂."""
    v1: float
    """Variance of Î₁ with one label, Σᵢ E g⁴ − F², exact."""
    v1_spectral: float
    """Bound on ``v1``: Σᵢ ‖Jᵢ‖⁴ λ_max(M)."""
    v1_range: float
    """Bound on ``v1``: Σᵢ Fᵢᵢ (max_y g² − Fᵢᵢ)."""
    v2: float
    """Variance of Î₂ with one label, Σᵢ E Rᵢᵢ², exact."""
    v2_spectral: float
    """Bound on ``v2``: Σᵢ ‖∂²ᵢᵢh‖² λ_max(I), estimated."""

    @property
    def errors(self) -> tuple[float, float]:
        """√V1 and √V2 over ‖diag F‖: relative errors with a single label for given inputs."""
        return math.sqrt(self.v1) / self.norm, math.sqrt(self.v2) / self.norm

    @property
    def looseness(self) -> tuple[float, float, float]:
        """log₁₀(bound / variance) in the order above; NaN where the variance is zero."""
        pairs = ((self.v1_spectral, self.v1), (self.v1_range, self.v1), (self.v2_spectral, self.v2))
        first, second, third = (math.log10(b / v) if v else math.nan for b, v in pairs)
        return first, second, third


class Point(NamedTuple):
    """One measurement of one training."""

    epoch: float
    accuracy: float
    confidence: float
    layers: list[Layer]


Trainings = list[list[Point]]
"""The measurements of every seed in the order of time."""


class Spread(NamedTuple):
    """Median, lowest and highest value over the seeds at one epoch."""

    epoch: float
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the median and the range."""
        if self.high == self.low:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def over_seeds(trainings: Trainings, value_of: Callable[[Point], float]) -> list[Spread]:
    """Return the spread over the seeds of a value at each epoch."""
    rows = []
    for points in zip(*trainings, strict=True):
        values = [value_of(point) for point in points]
        rows.append(Spread(points[0].epoch, statistics.median(values), min(values), max(values)))
    return rows


def has_no_variance(trainings: Trainings, layer: int) -> bool:
    """Return whether the variance of Î₂ is exactly zero in every measurement of a layer."""
    return all(p.layers[layer].v2 == 0 for points in trainings for p in points)


def accuracy(point: Point) -> float:
    """Return the accuracy in %."""
    return 100 * point.accuracy


def confidence(point: Point) -> float:
    """Return the mean confidence in %."""
    return 100 * point.confidence


BLUE, RED = "#0072B2", "#D55E00"  # colours of Okabe and Ito, which colour-blind readers distinguish
STYLES = (("#000000", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
"""Colour and marker of each layer."""

CURVES: tuple[tuple[int, str, str, str, Callable[[Layer], float]], ...] = (
    (0, "variance V1 of Î₁", BLUE, "-", lambda x: x.v1),
    (0, "bound ‖J‖⁴ λmax(M) on V1", BLUE, "--", lambda x: x.v1_spectral),
    (0, "bound F (max g² − F) on V1", BLUE, ":", lambda x: x.v1_range),
    (0, "variance V2 of Î₂", RED, "-", lambda x: x.v2),
    (0, "bound ‖∂²h‖² λmax(I) on V2", RED, "--", lambda x: x.v2_spectral),
    (1, "", BLUE, "-", lambda x: x.errors[0]),
    (1, "", RED, "-", lambda x: x.errors[1]),
    (2, "", BLUE, "--", lambda x: x.looseness[0]),
    (2, "", BLUE, ":", lambda x: x.looseness[1]),
    (2, "", RED, "--", lambda x: x.looseness[2]),
)
"""Row of panels, label, colour, line style and value of each curve of a layer."""


def draw(trainings: Trainings, path: Path, activation: str) -> None:
    """Draw variances and bounds, relative errors and looseness of each layer; for all, F and V2/V1.

    Args:
        trainings: The measurements of every seed.
        path: The path of the figure.
        activation: The activation in the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, LAYERS + 1, figsize=(17, 9.6), sharex=True)
    for row in axes[1:, :-1]:
        for axis in row[1:]:
            axis.sharey(row[0])
    for i in range(LAYERS):
        _draw_layer(axes[:, i], trainings, i)
    _draw_comparison(axes[:, -1], trainings)
    _format_axes(axes)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Diagonal of the Fisher information: variance of its estimators along the training of a "
        f"{activation} MLP on digits\nmedians of {len(trainings)} seeds, shaded: lowest to highest"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_line(
    axis: Any,
    trainings: Trainings,
    value_of: Callable[[Point], float],
    color: str,
    **style: Any,
) -> None:
    """Draw the medians of a value over the epochs, and its range over the seeds."""
    rows = over_seeds(trainings, value_of)
    epochs, medians = [row.epoch for row in rows], [row.median for row in rows]
    axis.plot(epochs, medians, color=color, linewidth=1.6, markersize=4, markevery=2, **style)
    low, high = [row.low for row in rows], [row.high for row in rows]
    axis.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)


def _draw_layer(column: Any, trainings: Trainings, i: int) -> None:
    """Draw the curves of layer ``i`` into its column of panels."""
    silent = has_no_variance(trainings, i)
    for row, label, color, style, value_of in CURVES:
        if not (silent and color == RED):
            of_layer = lambda point, value_of=value_of: value_of(point.layers[i])  # noqa: E731
            _draw_line(column[row], trainings, of_layer, color, linestyle=style, label=label)
    column[0].set_title(f"layer {i + 1}")
    if silent:
        place = {"ha": "right", "transform": column[1].transAxes}
        column[1].text(0.96, 0.06, "V2 = 0 exactly", color=RED, **place)


def _draw_comparison(column: Any, trainings: Trainings) -> None:
    """Draw tr F and V2/V1 of all layers, and the accuracy, into the last column of panels."""
    for i, (color, marker) in enumerate(STYLES):
        style = {"marker": marker, "label": f"layer {i + 1}"}
        _draw_line(column[0], trainings, lambda p, i=i: p.layers[i].trace, color, **style)
        if not has_no_variance(trainings, i):
            ratio = lambda p, i=i: p.layers[i].v2 / p.layers[i].v1  # noqa: E731
            _draw_line(column[1], trainings, ratio, color, **style)
    _draw_line(column[2], trainings, accuracy, "#000000", label="accuracy")
    _draw_line(column[2], trainings, confidence, "#56B4E9", linestyle="--", label="mean confidence")


def _format_axes(axes: Any) -> None:
    """Set scales, labels and titles of all panels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (*axes[0], *axes[1]):
        axis.set_yscale("log")
    axes[0][0].set_ylabel("variance of one label, Σᵢ Vᵢ")
    axes[1][0].set_ylabel("relative error √V / ‖diag F‖")
    axes[2][0].set_ylabel("log₁₀(bound / variance)")
    axes[2][0].set_ylim(bottom=0)
    axes[1][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1][0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes[1][0].yaxis.set_minor_formatter(NullFormatter())
    last = axes[:, -1]
    for axis, title in zip(last, ("tr F", "V2 / V1", "held-out digits (%)"), strict=True):
        axis.set_title(title)
        axis.set_visible(axis.has_data())
        if axis.has_data():
            axis.legend(frameon=False, fontsize=9)
    last[1].axhline(1, color="0.4", linewidth=0.8)
    last[1].text(0.2, 0.85, "Î₂ has the smaller error", color="0.3", fontsize=9, va="top")
    for axis in axes.flat:
        axis.grid(True, color="0.9", linewidth=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
