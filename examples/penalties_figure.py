"""The settings of ``examples/penalties.py``, and the figure of their measurements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

NONE, EARLY = "no penalty", "no penalty, stopped early"

STYLES = {  # colours of Okabe and Ito, which colour-blind readers distinguish, and shapes
    EARLY: ("#000000", "o", ":"),
    "frobenius": ("#E69F00", "s", "-"),
    "spectral": ("#0072B2", "^", "-"),
    "spectral, not before BatchNorm": ("#009E73", "D", "-"),
}

PANELS = (  # title, horizontal value, vertical value, vertical label
    ("absolute", "accuracy", "variance", "label variance Σᵢ Vᵢ ((nats/unit²)²)"),
    ("relative", "accuracy", "relative", "label variance / ‖diag F‖²"),
    ("relative, over confidence", "confidence", "relative", "label variance / ‖diag F‖²"),
)


class Setting(NamedTuple):
    """A curve of the figure and a point on it: a penalty's strength, or a share of the epochs."""

    model: str
    penalty: str
    strength: float


Runs = dict[Setting, list[dict[str, float]]]
"""The measurements of every setting, one for each seed."""


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error; the error of a single value is NaN."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def draw(results: Runs, models: list[str], path: Path) -> None:
    """Draw variances over accuracy, absolute and relative, and over confidence.

    Args:
        results: The measurements of all settings.
        models: The models, a row of panels for each.
        path: The path of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(models), len(PANELS), figsize=(13, 3.9 * len(models)), squeeze=False
    )
    for row, model in zip(axes, models, strict=True):
        for axis, (title, across, up, label) in zip(row, PANELS, strict=True):
            for penalty in STYLES:
                _draw_curve(axis, results, model, penalty, across, up)
            _format_axis(axis, results, model, across)
            axis.set_ylabel(label)
            axis.set_title(f"{model}: {title}")
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    seeds = len(results[Setting(models[0], NONE, 0.0)])
    figure.suptitle(
        "Weight-norm penalties and the variance of Î₁ on digits: lines run from no penalty to the "
        f"strongest,\ndotted from early in training to its end; means ± standard errors of {seeds} "
        "seeds; grey: accuracy without penalty ± 2 standard errors"
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_curve(axis: Any, results: Runs, model: str, penalty: str, across: str, up: str) -> None:
    """Draw the means and standard errors of all settings of one penalty."""
    settings = [s for s in results if (s.model, s.penalty) == (model, penalty)]
    if not settings:
        return
    none = Setting(model, NONE, 0.0)  # the point that all curves share
    settings = [*settings, none] if penalty == EARLY else [none, *settings]
    points = []
    for setting in settings:
        runs = results[setting]
        if across == "accuracy":
            xs = [100 * run["accuracy"] for run in runs]
        else:
            xs = [100 * (1 - run["confidence"]) for run in runs]
        points.append((*mean_and_error(xs), *mean_and_error([run[up] for run in runs])))
    x, dx, y, dy = (list(column) for column in zip(*points, strict=True))
    color, marker, style = STYLES[penalty]
    axis.errorbar(
        x,
        y,
        xerr=None if math.isnan(dx[0]) else dx,
        yerr=None if math.isnan(dy[0]) else dy,
        color=color,
        marker=marker,
        linestyle=style,
        markersize=5,
        zorder=3 if penalty == EARLY else 2,
        linewidth=1.2,
        elinewidth=1,
        capsize=2,
        label=penalty,
    )


def _format_axis(axis: Any, results: Runs, model: str, across: str) -> None:
    """Set the scales, the labels of the ticks and the range of the accuracy without penalty."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    if across == "confidence":
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        runs = results[Setting(model, NONE, 0.0)]
        mean, error = mean_and_error([100 * run["accuracy"] for run in runs])
        if not math.isnan(error):
            axis.axvspan(mean - 2 * error, mean + 2 * error, color="0.9", zorder=0)
            axis.set_xlim(left=max(axis.get_xlim()[0], mean - 4))
    axis.set_xlabel("test accuracy (%)" if across == "accuracy" else "1 − mean confidence (%)")
    axis.grid(True, which="major", color="0.85", linewidth=0.6)
    axis.set_axisbelow(True)
