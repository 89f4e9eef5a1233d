"""Pictures of a run, drawn with matplotlib's objects: no pyplot, no state outside of a figure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fimprobe.report import Report
from fimprobe.sinks.tags import KINDS, diagonal_values

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
"""Okabe and Ito's colours: told apart by colour-blind readers."""

COLOURS = {"i1": BLUE, "i2": ORANGE}
MARKERS = {"i1": "o", "i2": "D"}

DPI = 140
WIDTH = 5.2
"""Inches: TensorBoard shows pictures 350 pixels wide, where larger ones could not be read."""

TEXT, TITLE, NAME = 9, 10.5, 14
LINE = 0.17
"""Inches that a row's label takes."""

COLUMNS = 120
"""Reports in the heat map; of longer runs every second, fourth, ... is shown."""


class Gallery:
    """Remembers the errors of a run's layers, and draws all pictures of a report."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.errors: list[dict[str, dict[str, float | None]]] = []
        self._seen, self._stride = 0, 1

    def remember(self, report: Report) -> None:
        """Keep a column of the heat map."""
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self.steps.append(report.step)
        self.errors.append(
            {
                kind: {
                    name: getattr(group, kind).rel_error
                    for name, group in report.layers.items()
                    if getattr(group, kind) is not None
                }
                for kind in ("i1", "i2")
            }
        )
        if len(self.steps) > COLUMNS:
            self._stride *= 2
            self.steps, self.errors = self.steps[::2], self.errors[::2]

    def draw(self, report: Report) -> Iterator[tuple[str, bytes, tuple[int, int]]]:
        """Name, PNG and (width, height) of each picture that there are values for."""
        for name, figure in self.figures(report).items():
            if figure is not None:
                yield name, *encode(figure)

    def figures(self, report: Report) -> dict[str, Figure | None]:
        """Every picture by name."""
        return {
            "1_relative_error": draw_errors(self.steps, self.errors, list(report.layers)),
            "2_variance_and_bound": draw_variances(report),
            "3_pairs_needed": draw_pairs(report),
            "4_diagonal": draw_diagonal(report),
        }


def encode(figure: Figure) -> tuple[bytes, tuple[int, int]]:
    """PNG and its size in pixels."""
    canvas = FigureCanvasAgg(figure)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue(), canvas.get_width_height()


def draw_errors(
    steps: Sequence[int],
    errors: Sequence[dict[str, dict[str, float | None]]],
    layers: Sequence[str],
) -> Figure | None:
    """Layer × step heat maps of the relative errors of Î₁ and Î₂, one scale of colours."""
    found = {}
    for kind in ("i1", "i2"):
        rows = [[column[kind].get(name) for column in errors] for name in layers]
        grid = np.array(rows, dtype=float).reshape(len(layers), len(errors))
        grid[~(grid > 0)] = np.nan
        if np.isfinite(grid).any():
            found[kind] = grid
    if not found:
        return None
    figure, axes = _panels(
        len(layers), len(found), "Relative error of diag F (yellow: noise, grey: not known)"
    )
    norm = LogNorm(0.01, 1.0)
    for axis, (kind, grid) in zip(axes, found.items(), strict=True):
        axis.set_facecolor("#DDDDDD")
        image = axis.imshow(grid, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axis.set_title(KINDS[kind], fontsize=NAME)
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(3, len(steps))).round().astype(int))
        axis.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks], fontsize=TEXT)
        axis.set_xlabel("step", fontsize=TEXT)
    _name_rows(axes[0], layers)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.02, fraction=0.05, aspect=22)
    bar.set_ticks([0.01, 0.03, 0.1, 0.3, 1], labels=["1 %", "3 %", "10 %", "30 %", "100 %"])
    bar.ax.tick_params(labelsize=TEXT)
    bar.ax.minorticks_off()
    return figure


def draw_variances(report: Report) -> Figure | None:
    """Each layer's variance of one pair, from labels and from inputs, with the labels' bound."""
    names = ("label_variance", "input_variance")
    kinds = [k for k in ("i1", "i2") if any(np.isfinite(_column(report, k, n)).any() for n in names)]
    if not kinds:
        return None
    layers = list(report.layers)
    figure, axes = _panels(len(layers), len(kinds), "Variance of one (input, label) pair")
    for axis, kind in zip(axes, kinds, strict=True):
        for name, label, colour, marker in (
            ("diagonal_bound", "labels' bound", BLACK, "|"),
            ("label_variance", "from labels", BLUE, "o"),
            ("input_variance", "from inputs", ORANGE, "^"),
        ):
            values = _column(report, kind, name)
            axis.scatter(
                values, np.arange(len(layers)), s=60 if marker == "|" else 20, c=colour,
                marker=marker, label=label, zorder=3,
            )  # fmt: skip
        labels, bounds = (_column(report, kind, n) for n in ("label_variance", "diagonal_bound"))
        axis.hlines(np.arange(len(layers)), labels, bounds, colors="#BBBBBB", linewidth=1.5)
        axis.set_title(KINDS[kind], fontsize=NAME)
        axis.set_xlabel("no mark: zero or unknown", fontsize=TEXT)
        _log_axis(axis)
    _name_rows(axes[0], layers)
    _legend(figure, axes[0])
    return figure


def draw_pairs(report: Report) -> Figure | None:
    """(input, label) pairs that a relative error of 10 % takes, by layer, against those measured."""
    layers = list(report.layers)
    found = {}
    for kind in ("i1", "i2"):
        estimates = [getattr(g, kind) for g in report.layers.values()]
        needs = np.array([np.nan if e is None else e.draws_for(0.1) or np.nan for e in estimates])
        if np.isfinite(needs).any():
            found[kind] = np.maximum(needs, 1.0)
    if not found:
        return None
    figure, (axis,) = _panels(len(layers), 1, "(input, label) pairs for 10 % error")
    for kind, needs in found.items():
        axis.scatter(
            needs, np.arange(len(layers)), s=26, c=COLOURS[kind], marker=MARKERS[kind],
            label=KINDS[kind], zorder=3, alpha=0.85,
        )  # fmt: skip
    pairs = report.batch_size * (report.draws or 1)
    told = f"measured: {pairs:,}" if report.draws else f"measured: {pairs:,} inputs, all labels"
    axis.axvline(pairs, color=BLACK, linestyle="--", linewidth=1.5, label=told)
    _log_axis(axis)
    _name_rows(axis, layers)
    _legend(figure, axis)
    return figure


def draw_diagonal(report: Report) -> Figure | None:
    """How large the entries of diag F are; the parameters' means, where the entries are not kept."""
    found = {kind: diagonal_values(report, kind) for kind in ("i1", "i2")}
    found = {kind: pair for kind, pair in found.items() if pair[0].size}
    if not found:
        return None
    kept = any(g.i1.diagonal is not None for g in report.parameters.values())
    figure = Figure((WIDTH, 3.2), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle("Sizes of the entries of diag F", fontsize=TITLE)
    axis = figure.add_subplot()
    values = np.concatenate([values for values, _ in found.values()])
    edges = np.linspace(np.floor(values.min()), np.ceil(values.max()) + 1e-9, 31)
    for kind, (logs, weights) in found.items():
        counts, _ = np.histogram(logs, edges, weights=weights)
        axis.stairs(
            counts, 10.0**edges, color=COLOURS[kind], linewidth=2, label=KINDS[kind],
            linestyle="-" if kind == "i1" else "--",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylabel("entries", fontsize=TEXT)
    axis.set_xlabel(
        "entry of diag F" if kept else "mean entry of diag F of each parameter tensor", fontsize=TEXT
    )
    _log_axis(axis)
    axis.tick_params(labelsize=TEXT)
    _legend(figure, axis)
    return figure


def _panels(rows: int, columns: int, title: str) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share their rows, as high as the rows' labels need."""
    height = min(max(1.5 + LINE * rows, 2.6), 6.5)
    figure = Figure((WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=TITLE)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    return figure, list(axes)


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Names at the rows, every k-th where all would overlap, the first layer on top."""
    figure = axis.figure
    room = int((figure.get_figure(root=True).get_figheight() - 1.3) / LINE)
    stride = -(-len(names) // max(room, 1))
    rows = range(0, len(names), stride)
    shown = shorten(names)
    axis.set_yticks(list(rows), [shown[i] for i in rows], fontsize=TEXT)
    axis.set_ylim(len(names) - 0.5, -0.5)


def shorten(names: Sequence[str], most: int = 20) -> list[str]:
    """Names without the modules that all share, cut to the end, which tells them apart.

    >>> shorten(["model.layers.0.mlp", "model.layers.10.mlp"])
    ['0.mlp', '10.mlp']
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(
        len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts
    ):
        shared += 1
    short = [".".join(p[shared:]) for p in parts]
    return [name if len(name) <= most else f"…{name[1 - most :]}" for name in short]


def _log_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(numticks=4))
    axis.xaxis.set_major_formatter(FuncFormatter(_power))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=TEXT)
    axis.grid(axis="both", color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)


def _power(x: float, _: Any) -> str:
    """1, 10, ..., 100 k, 100 M in words, others as powers of ten."""
    for size, unit in ((1e6, " M"), (1e4, " k"), (1.0, "")):
        if size <= x < 1e9:
            return f"{x / (1e3 if unit == ' k' else size):,.0f}{unit}"
    return f"$10^{{{round(np.log10(x))}}}$" if x > 0 else ""


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=TITLE, frameon=False
    )


def _column(report: Report, kind: str, name: str) -> np.ndarray:
    """A value of every layer, NaN where there is none above zero."""
    estimates = (getattr(group, kind) for group in report.layers.values())
    values = [np.nan if e is None else getattr(e, name) for e in estimates]
    column = np.array([np.nan if v is None else v for v in values], dtype=float)
    column[~(column > 0)] = np.nan
    return column
