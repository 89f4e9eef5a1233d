"""Pictures of a run: reports (as ``Report.to_dict`` gives them) to matplotlib figures.

Every function returns None where the reports hold nothing to draw. Figures are transparent; all that
is neither data nor a colour map is drawn in ``INK``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fimprobe.table import count, drawn_error, neediest, number, percent, thin

INK = "#010203"
"""A colour of its own, so that a page can put the text's colour in its place."""

NAMES = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H"}
COLORS = {"i1": "#3b82d6", "i2": "#e0752d", "ih": "#2c9c69"}
MOST_BARS, MOST_COLUMNS = 24, 200


def draw_errors(reports: Sequence[dict[str, Any]]) -> Figure | None:
    """Relative errors of the whole model's estimators over steps."""
    figure, axes = _axes(6.4, 3.0)
    drawn = False
    for kind, name in NAMES.items():
        errors = [drawn_error(r, r["total"].get(kind, {})) for r in reports]
        values = np.array(errors, dtype=float)
        if np.isfinite(values).any():
            drawn = True
            style = {"i1": "-", "i2": "--", "ih": ":"}[kind]  # lines may lie on each other
            axes.plot(
                _steps(reports), values, style, marker="o", ms=3, color=COLORS[kind], label=name
            )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
    return _over_steps(figure, axes, "relative error") if drawn else None


def draw_traces(reports: Sequence[dict[str, Any]]) -> Figure | None:
    """Traces over steps with ± 2 standard errors."""
    figure, axes = _axes(6.4, 3.0)
    drawn = False
    for kind, name in NAMES.items():
        values, errors = _series(reports, kind, "trace"), _series(reports, kind, "std_error")
        if np.isfinite(values).any():
            drawn = True
            style = {"i1": "-", "i2": "--", "ih": ":"}[kind]
            axes.plot(
                _steps(reports), values, style, marker="o", ms=3, color=COLORS[kind], label=name
            )
            low, high = values - 2 * errors, values + 2 * errors
            axes.fill_between(_steps(reports), low, high, color=COLORS[kind], alpha=0.18, lw=0)
    return _over_steps(figure, axes, "trace of F") if drawn else None


def draw_error_map(reports: Sequence[dict[str, Any]], kind: str = "i1") -> Figure | None:
    """Relative error by layer (rows) and report (columns)."""
    picks = thin(reports, MOST_COLUMNS)
    columns = len(picks)
    names = list(dict.fromkeys(name for report in picks for name in report["layers"]))
    values = np.full((len(names), columns), np.nan)
    for j, report in enumerate(picks):
        for i, name in enumerate(names):
            error = drawn_error(report, report["layers"].get(name, {}).get(kind, {}))
            if error:
                values[i, j] = error
    if not np.isfinite(values).any():
        return None
    figure, axes = _axes(7.2, min(1.2 + 0.24 * len(names), 11))
    low, high = np.nanmin(values), np.nanmax(values)
    if high < 1.5 * low:  # a flat run is shown flat
        low, high = low / 1.5, high * 1.5
    image = axes.imshow(
        values, aspect="auto", interpolation="none", norm=LogNorm(low, high), cmap="viridis"
    )
    stride = -(-len(names) // 50)
    axes.set_yticks(range(0, len(names), stride), [_short(n) for n in names[::stride]])
    shown = sorted({round(i * (columns - 1) / 7) for i in range(8)})
    axes.set_xticks(shown, [f"{picks[i]['step']:,}" for i in shown])
    axes.set_xlabel("step (a column for each report)", color=INK)
    axes.grid(False)
    if values.size <= 150 and columns <= 14:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                bright = np.log(value / low) / np.log(high / low) > 0.6
                color = "#101010" if bright else "#ffffff"
                axes.text(j, i, percent(float(f"{value:.2g}")), ha="center", va="center",
                          color=color, fontsize=7)  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(which="both", colors=INK, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def draw_variances(report: dict[str, Any]) -> Figure | None:
    """Label and input variance of one pair by layer, with the bound on the former."""
    bars = [
        ("Î₁: labels", "i1", "label_variance", COLORS["i1"]),
        ("Î₂: labels", "i2", "label_variance", COLORS["i2"]),
        ("inputs (both)", "i1", "input_variance", "#8a8f98"),
    ]
    figure, axes, layers = _bars(report, bars, number)
    if figure is None:
        return None
    for kind in ("i1", "i2"):
        places = [i for i, (label, k, _, _) in enumerate(bars) if k == kind and "labels" in label]
        bounds = [group.get(kind, {}).get("diagonal_bound") or np.nan for _, group in layers]
        if np.isfinite(bounds).any():
            y = np.arange(len(layers)) + _offset(places[0], len(bars))
            axes.set_xlim(right=max(axes.get_xlim()[1], 2 * np.nanmax(bounds)))
            axes.plot(bounds, y, "|", ms=8, mew=2, color=COLORS[kind])
            axes.plot([], [], "|", ms=8, mew=2, color=COLORS[kind], label=f"bound on {NAMES[kind]}")
    return _legend(figure, axes)


def draw_bounds(report: dict[str, Any]) -> Figure | None:
    """‖Cov‖_F beside (17), (18); where labels were drawn, L beside the bound on it."""
    value, bound = ("covariance_norm", "bound") if is_exact(report) else (
        "total_label_variance", "trace_bound")  # fmt: skip
    layers = _most_needy(report)
    figure, axes = _axes(6.4, 1.2 + 0.3 * len(layers))
    drawn = False
    for place, kind in enumerate(("i1", "i2")):
        y = np.arange(len(layers)) + _offset(place, 2)
        pairs = [
            [group.get(kind, {}).get(x) or np.nan for x in (value, bound)] for _, group in layers
        ]
        ends = np.array(pairs, dtype=float).reshape(-1, 2)
        ends[~(ends > 0)] = np.nan
        if np.isfinite(ends[:, 1]).any():
            drawn = True
            color = COLORS[kind]
            axes.hlines(y, ends[:, 0], ends[:, 1], color=color, alpha=0.5)
            axes.plot(ends[:, 0], y, "o", ms=5, color=color, label=f"{NAMES[kind]}: measured")
            axes.plot(
                ends[:, 1], y, "o", ms=5, mfc="none", color=color, label=f"{NAMES[kind]}: bound"
            )
    if not drawn:
        return None
    _layer_axis(axes, layers)
    return _legend(figure, axes)


def draw_needs(report: dict[str, Any]) -> Figure | None:
    """Pairs for a relative error of 10 % by layer."""
    bars = [
        (name, kind, "draws_for_10_percent", COLORS[kind])
        for kind, name in NAMES.items()
        if kind in report["total"]
    ]
    figure, axes, _ = _bars(report, bars, count)
    if figure is None:
        return None
    if not is_exact(report):
        pairs = report["batch_size"] * report["draws"]
        axes.axvline(pairs, color=INK, ls="--", lw=1, label=f"measured: {pairs:,}")
    return _legend(figure, axes)


def to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element, its text as text, ``INK`` the colour of the text around it.

    ``name`` keeps its ids apart from those of other pictures in the same page.
    """
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    start, rest = text.split(">", 1)
    width = re.search(r'viewBox="0 0 ([\d.]+)', start)
    assert width is not None
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    # as wide as drawn; a page makes it less on narrow screens
    return f'{start} style="width:{float(width[1]) * 1.25:.0f}px">{rest}'


# -- parts ---------------------------------------------------------------------------------


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.grid(True, color=INK, alpha=0.15, lw=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(INK)
        spine.set_alpha(0.4)
    return figure, axes


def _over_steps(figure: Figure, axes: Axes, what: str) -> Figure:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(what, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return _legend(figure, axes)


def _bars(
    report: dict[str, Any], bars: list[tuple[str, str, str, str]], tell: Callable[[float], str]
) -> tuple[Figure | None, Axes, list[tuple[str, dict[str, Any]]]]:
    """Horizontal bars on a logarithmic axis; what is not above 0 is written beside it."""
    layers = _most_needy(report)
    figure, axes = _axes(6.4, 1.2 + (0.09 + 0.13 * len(bars)) * len(layers))
    found = [[group.get(kind, {}).get(name) for _, group in layers] for _, kind, name, _ in bars]
    positive = [v for values in found for v in values if v is not None and v > 0]
    if not positive:
        return None, axes, layers
    floor = min(positive) / 3
    for place, ((label, _, _, color), values) in enumerate(zip(bars, found, strict=True)):
        if all(v is None for v in values):
            continue
        y = np.arange(len(layers)) + _offset(place, len(bars))
        ends = [v if v is not None and v > 0 else floor for v in values]
        axes.barh(y, np.array(ends) - floor, left=floor, height=0.8 / len(bars), color=color,
                  label=label)  # fmt: skip
        for at, value in zip(y, values, strict=True):
            if value is not None and value <= 0:
                axes.text(
                    floor,
                    at,
                    " 0" if value == 0 else " below 0: noise",
                    color=color,
                    va="center",
                    fontsize=7,
                )
            elif value is not None and len(layers) <= 12:
                axes.text(value, at, f" {tell(value)}", color=INK, va="center", fontsize=7)
    _layer_axis(axes, layers)
    axes.set_xlim(floor, 4 * max(positive))
    return figure, axes, layers


def _layer_axis(axes: Axes, layers: list[tuple[str, dict[str, Any]]]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(layers)), [_short(name) for name, _ in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _legend(figure: Figure, axes: Axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False,
                  labelcolor=INK, fontsize=9, handletextpad=0.4, columnspacing=1.2)  # fmt: skip
    return figure


def _most_needy(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """At most ``MOST_BARS`` layers, those that need most pairs, in the order of the model."""
    chosen = {name for name, _ in neediest(report, MOST_BARS)}
    return [(name, group) for name, group in report["layers"].items() if name in chosen]


def is_exact(report: dict[str, Any]) -> bool:
    """Whether labels were integrated over."""
    return bool(report["draws"] == "exact")


def _offset(place: int, bars: int) -> float:
    return 0.8 * ((place + 0.5) / bars - 0.5)


def _steps(reports: Sequence[dict[str, Any]]) -> list[int]:
    return [report["step"] for report in reports]


def _series(reports: Sequence[dict[str, Any]], kind: str, name: str) -> np.ndarray:
    """A value of the whole model over reports, NaN where it is not known."""
    return np.array([r["total"].get(kind, {}).get(name) for r in reports], dtype=float)


def _short(name: str, most: int = 30) -> str:
    """A layer's name, its middle left out where it is long."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"
