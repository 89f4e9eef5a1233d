"""The parts of a picture, by matplotlib's objects: no pyplot, no state outside of a figure.

The one importer of matplotlib. Figures are transparent, as wide as TensorBoard shows them; all that
is neither data nor a colour map is drawn in ``INK``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fimprobe.report.format import percent

INK = "#010203"
"""A colour of its own, so that a page can put the text's colour in its place."""

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Okabe and Ito's colours: told apart by colour-blind readers."""

GREY = "#9AA0A6"
"""What is not known, on light and on dark pages."""

DPI = 140
WIDTH = 5.2
"""Inches: TensorBoard shows pictures 350 pixels wide, where larger ones could not be read."""

TEXT, TITLE, NAME = 9, 10.5, 14
LINE = 0.17
"""Inches that a row's label takes."""


def make_panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share their rows, as high as the rows' labels need."""
    return _panels(min(max(1.5 + LINE * rows, 2.6), 6.5), columns)


def make_chart() -> tuple[Figure, Axes]:
    """One panel for lines or a histogram."""
    figure, (axis,) = _panels(3.2, 1)
    return figure, axis


def name_panels(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """An estimator's name above each panel."""
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=NAME, color=INK)


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Names at the rows, every k-th where all would overlap, the first layer on top."""
    room = int((axis.figure.get_figure(root=True).get_figheight() - 1.3) / LINE)
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


def label_axis(axis: Axes, what: str, *, upright: bool = False) -> None:
    """What the values along the axis are."""
    put = axis.set_ylabel if upright else axis.set_xlabel
    put(what, fontsize=TEXT, color=INK)


def make_logarithmic(axis: Axes) -> None:
    """Few powers of ten, large ones in words."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(numticks=4))
    axis.xaxis.set_major_formatter(FuncFormatter(_power))
    axis.xaxis.set_minor_formatter(NullFormatter())


def make_steps(axis: Axes, *, shares: bool = False) -> None:
    """Whole steps to the right; ``shares``: upright, in percent, on a logarithmic scale."""
    label_axis(axis, "step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    if shares:
        make_shares(axis)


def make_shares(axis: Axes) -> None:
    """Upright, in percent, on a logarithmic scale."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=9))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def make_falling(axis: Axes) -> None:
    """To the right, from large to small on a logarithmic scale."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.invert_xaxis()


def draw_grids(
    figure: Figure, axes: Sequence[Axes], grids: Sequence[np.ndarray], steps: Sequence[int]
) -> None:
    """Heat maps of shares [rows, steps] on one scale of colours, which is the same in every run."""
    highest = max(float(np.nanmax(grid)) for grid in grids)
    ticks = [0.01, 0.03, 0.1, 0.3, 1.0] if highest < 1.5 else [0.01, 0.1, 1.0, 10.0]
    norm = LogNorm(ticks[0], ticks[-1])
    for axis, grid in zip(axes, grids, strict=True):
        axis.set_facecolor(GREY)
        image = axis.imshow(grid, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axis.grid(False)
        shown = np.unique(np.linspace(0, len(steps) - 1, min(3, len(steps))).round().astype(int))
        axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown], fontsize=TEXT)
        label_axis(axis, "step")
    bar = figure.colorbar(image, ax=list(axes), extend="both", pad=0.02, fraction=0.05, aspect=22)
    bar.set_ticks(ticks, labels=[f"{100 * tick:,.0f} %" for tick in ticks])
    bar.ax.tick_params(labelsize=TEXT, colors=INK)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)  # type: ignore[operator]


def add_legend(figure: Figure, axis: Axes) -> Figure:
    """What the marks mean, below the panels."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=TEXT + 0.5,
        frameon=False, labelcolor=INK, handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip
    return figure


def to_png(figure: Figure, title: str) -> tuple[bytes, tuple[int, int]]:
    """A PNG on white with its title, and its (width, height) in pixels."""
    figure.suptitle(title, fontsize=TITLE, color=INK)
    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue(), canvas.get_width_height()


def to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element, its text as text, ``INK`` the colour of the text around it.

    ``name`` keeps its ids apart from those of other pictures in the same page.
    """
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    start, rest = text.split(">", 1)
    width = re.search(r'viewBox="0 0 ([\d.]+)', start)
    assert width is not None
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    # as wide as drawn; a page makes it less on narrow screens
    return f'{start} style="width:{float(width[1]) * 1.35:.0f}px">{rest}'


def _panels(height: float, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure((WIDTH, height), dpi=DPI, facecolor="none", layout="constrained")
    axes = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    for axis in axes:
        axis.set_facecolor("none")
        axis.tick_params(which="both", colors=INK, labelsize=TEXT)
        axis.grid(True, color=INK, alpha=0.12, lw=0.7)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_edgecolor(INK)
            spine.set_alpha(0.4)
    return figure, axes


def _power(x: float, _: Any) -> str:
    """1, 10, ..., 100 k, 100 M in words, others as powers of ten."""
    for size, unit in ((1e6, " M"), (1e4, " k"), (1.0, "")):
        if size <= x < 1e9:
            return f"{x / (1e3 if unit == ' k' else size):,.0f}{unit}"
    return f"$10^{{{round(np.log10(x))}}}$" if x > 0 else ""
