"""The curves of ``examples/natural_gradient.py``, and their figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

PLAIN, EXACT = "none: gradient descent", "F"


class Curve(NamedTuple):
    """Excess losses [seeds, steps + 1], ‖Î − F‖_F/‖F‖_F at the start [seeds], and the step size η."""

    excess: Tensor
    error: Tensor
    rate: float


Curves = dict[tuple[str, int], Curve]
"""The curves of one problem by estimator and number of draws."""


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over the first dimension; the error of one value is NaN."""
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else math.nan * values[0]
    return values.mean(0), error


def root_mean_square(values: Tensor) -> tuple[float, float]:
    """Return the root mean square and its standard error."""
    mean, error = (float(v) for v in mean_and_error(values.square()))
    return math.sqrt(mean), error / (2 * math.sqrt(mean)) if mean else error


def draw(
    results: dict[str, Curves], theory: dict[str, list[float]], path: Path, damping: float
) -> None:
    """Draw the excess loss over steps for each problem, and the error of Î₁ over the draws.

    Args:
        results: The curves of every problem by its name.
        theory: The predicted error of Î₁ for each number of draws.
        path: The path of the figure.
        damping: The damping in the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results) + 1, figsize=(14, 4.6))
    for axis, (name, curves) in zip(axes, results.items(), strict=False):
        _draw_losses(axis, curves, pyplot.get_cmap("viridis"))
        axis.set_title(name)
    _draw_noise(axes[-1], results, theory)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    seeds = max(len(curve.excess) for curves in results.values() for curve in curves.values())
    figure.suptitle(
        f"Natural gradient with an estimated Fisher information: means ± standard errors of {seeds} "
        f"seeds,\neach curve at its best step size, damping {damping:g} × mean diagonal of F"
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_losses(axis: Any, curves: Curves, shades: Any) -> None:
    """Draw the excess loss of every curve over steps."""
    ends, all_draws = [], draws_of_i1(curves)
    for (estimator, draws), curve in curves.items():
        mean, error = mean_and_error(curve.excess / curve.excess[:, :1])
        steps = range(len(mean))
        ends.append(float(mean[-1]))
        label = f"{estimator}, N = {draws}"
        if estimator == "Î₁":
            place = all_draws.index(draws) / (len(all_draws) - 1)
            style = {"color": shades(0.9 - 0.75 * place), "marker": "osDv^"[all_draws.index(draws)]}
        elif estimator == "Î₂":
            style = {"color": "#D55E00", "marker": "x", "linestyle": "none", "zorder": 4}
        else:
            style = {"color": "black", "linestyle": ":" if estimator == PLAIN else "-"}
            label = "gradient descent" if estimator == PLAIN else "F exact"
        axis.plot(steps, mean, label=label, linewidth=1.3, markersize=5, markevery=3, **style)
        if not bool(error.isnan().any()) and estimator == "Î₁":
            low = (mean - error).clamp_min(1e-16)
            axis.fill_between(steps, low, mean + error, color=style["color"], alpha=0.25, linewidth=0)
    axis.set_yscale("log")
    axis.set_ylim(max(min(ends) / 3, 1e-9), 2)
    axis.set_xlabel("step")
    axis.set_ylabel("excess loss / excess loss at the start")
    axis.grid(True, color="0.88", linewidth=0.6)


def draws_of_i1(curves: Curves) -> list[int]:
    """Return the numbers of draws of the curves of Î₁."""
    return [draws for estimator, draws in curves if estimator == "Î₁"]


def _draw_noise(axis: Any, results: dict[str, Curves], theory: dict[str, list[float]]) -> None:
    """Draw the measured and the predicted error of Î₁ over the number of draws."""
    draws = draws_of_i1(next(iter(results.values())))
    for (name, curves), color, marker in zip(
        results.items(), ("#0072B2", "#E69F00"), "os", strict=True
    ):
        points = [root_mean_square(curves["Î₁", n].error) for n in draws]
        axis.errorbar(
            draws,
            [mean for mean, _ in points],
            yerr=None if math.isnan(points[0][1]) else [error for _, error in points],
            color=color,
            marker=marker,
            markersize=5,
            linestyle="none",
            capsize=2,
            label=f"Î₁, {name.partition(' (')[0]}",
        )
        axis.plot(draws, theory[name], color=color, linewidth=1)
    axis.plot([], [], color="0.4", linewidth=1, label="√(((tr F)²/‖F‖² + 1)/N)")
    axis.set_xscale("log", base=4)
    axis.set_yscale("log")
    axis.set_xticks(draws, [str(n) for n in draws])
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["10 %", "20 %", "50 %", "100 %", "200 %", "500 %"])
    axis.minorticks_off()
    axis.set_title("noise of the labels in Î₁ (in Î₂: none)")
    axis.set_xlabel("draws N of labels for the data set")
    axis.set_ylabel("‖Î₁ − F‖ / ‖F‖ at the start")
    axis.grid(True, color="0.88", linewidth=0.6)
    axis.legend(frameon=False, fontsize=9)
