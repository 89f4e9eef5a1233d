"""Axes, colours and file formats of the figures, by matplotlib's objects without pyplot's state.

This is the only module that imports matplotlib. Figures are transparent and as wide as TensorBoard
shows them. Everything except data and colour maps is drawn in ``INK``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fimprobe.plots.ticks import name_power, round_limits, round_ticks
from fimprobe.report.format import one_line, percent
from fimprobe.report.layer_names import cut

INK = "#010203"
"""A colour that nothing else has, so that a page can replace it with the colour of its text."""

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours of Okabe and Ito, which colour-blind readers distinguish."""

COLORS = {"i1": BLUE, "i2": ORANGE, "ih": GREEN}
STYLES = {"i1": "-", "i2": "--", "ih": ":"}  # lines may overlap
MARKERS = {"i1": "o", "i2": "D", "ih": "^"}

GREY = "#9AA0A6"
"""Colour of unknown values, visible on light and on dark pages."""

DPI = 140
WIDTH_INCHES = 5.0
"""TensorBoard shows images 350 pixels wide, without smoothing: half of these 700."""

MAX_NAME = 22
"""Characters of a row's name."""

TEXT_POINTS, TITLE_POINTS, NAME_POINTS = 9, 10.5, 14
LINE_INCHES = 0.17
"""Height of a row's label."""

GAP_INCHES = 0.08
"""Space between texts, and between a text and the edge of the figure."""

TICK_INCHES = 0.08
"""Length of a tick with the space behind it."""

LEGEND_INCHES, BAR_INCHES = 0.3, 0.1
"""Height of the legend, and width of the bar of colours."""

_BAR = "colour bar"


def make_panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Return panels side by side with common rows, as high as the labels of the rows need.

    Args:
        rows: Number of rows with a label.
        columns: Number of panels.

    Returns:
        The figure, and its panels from left to right.
    """
    return _panels(min(max(1.5 + LINE_INCHES * rows, 2.6), 6.5), columns)


def make_chart() -> tuple[Figure, Axes]:
    """Return one panel for lines or a histogram."""
    figure, (axis,) = _panels(3.2, 1)
    return figure, axis


def name_panels(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Write an estimator's name above each panel.

    Args:
        axes: The panels.
        names: One name for each panel.
    """
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=NAME_POINTS, color=INK, y=1.0)


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Write names at the rows, the first on top; only every k-th one where all would overlap.

    Args:
        axis: The left panel.
        names: One name for each row.
    """
    available = int((axis.figure.get_figure(root=True).get_figheight() - 1.3) / LINE_INCHES)
    stride = -(-len(names) // max(available, 1))
    rows = range(0, len(names), stride)
    # a dollar sign would begin a formula
    labels = [cut(one_line(names[i]), MAX_NAME).replace("$", r"\$") for i in rows]
    axis.set_yticks(list(rows), labels, fontsize=TEXT_POINTS)
    axis.set_ylim(len(names) - 0.5, -0.5)


def label_axis(axis: Axes, quantity: str, *, upright: bool = False) -> None:
    """Label an axis with its quantity.

    Args:
        axis: The panel.
        quantity: The text.
        upright: Whether to label the vertical axis in place of the horizontal one.
    """
    set_label = axis.set_ylabel if upright else axis.set_xlabel
    set_label(quantity, fontsize=TEXT_POINTS, color=INK)


def make_logarithmic(axis: Axes, *, upright: bool = False) -> None:
    """Make an axis logarithmic, with few powers of ten.

    Args:
        axis: The panel.
        upright: Whether to make the vertical axis so in place of the horizontal one.
    """
    (axis.set_yscale if upright else axis.set_xscale)("log")
    one = axis.yaxis if upright else axis.xaxis
    one.set_major_locator(LogLocator(numticks=4))
    one.set_major_formatter(FuncFormatter(lambda x, _: name_power(x)))
    one.set_minor_locator(NullLocator())


def make_steps(axis: Axes, *, shares: bool = False) -> None:
    """Make the horizontal axis one of steps.

    Args:
        axis: The panel.
        shares: Whether the vertical axis shows shares: logarithmic, in percent.
    """
    label_axis(axis, "step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    if shares:
        make_shares(axis)


def make_shares(axis: Axes) -> None:
    """Make the upright axis logarithmic, in percent, from one round share to another."""
    axis.set_yscale("log")
    _make_round(axis.yaxis)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
    low, high = round_limits(*axis.dataLim.intervaly)
    axis.set_ylim(low, 1.2 * high)  # space for marks at the top


def make_falling(axis: Axes) -> None:
    """Make the horizontal axis logarithmic, from a large round number to a small one."""
    axis.set_xscale("log")
    _make_round(axis.xaxis)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xlim(*reversed(round_limits(*axis.dataLim.intervalx)))


def draw_grids(
    figure: Figure, axes: Sequence[Axes], grids: Sequence[np.ndarray], steps: Sequence[int]
) -> None:
    """Draw heat maps of shares on one colour scale, which is the same in every run.

    Args:
        figure: The figure of the panels.
        axes: The panels.
        grids: The shares of each panel [rows, steps]; NaN where unknown.
        steps: The step of each column.
    """
    highest = max(float(np.nanmax(grid)) for grid in grids)
    ticks = [0.01, 0.03, 0.1, 0.3, 1.0] if highest < 1.5 else [0.01, 0.1, 1.0, 10.0]
    norm = LogNorm(ticks[0], ticks[-1])
    for axis, grid in zip(axes, grids, strict=True):
        axis.set_facecolor(GREY)
        image = axis.imshow(grid, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axis.grid(False)
        shown = np.unique(np.linspace(0, len(steps) - 1, min(3, len(steps))).round().astype(int))
        axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown], fontsize=TEXT_POINTS)
        label_axis(axis, "step")
    bar = figure.colorbar(image, cax=figure.add_subplot(label=_BAR), extend="both")
    bar.set_ticks(ticks, labels=[f"{100 * tick:,.0f} %" for tick in ticks])
    bar.ax.tick_params(labelsize=TEXT_POINTS, colors=INK)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)  # type: ignore[operator]


def add_legend(figure: Figure, axis: Axes) -> Figure:
    """Add a legend below the panels.

    Args:
        figure: The figure.
        axis: The panel whose lines the legend names.

    Returns:
        The same figure.
    """
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels), fontsize=TEXT_POINTS + 0.5,
        frameon=False, labelcolor=INK, handlelength=1.7, handletextpad=0.5, columnspacing=1.2,
        borderaxespad=0.2, borderpad=0.2,
    )  # fmt: skip
    return figure


def to_png(figure: Figure, title: str) -> tuple[bytes, tuple[int, int]]:
    """Return a PNG on white with a title, and its size.

    Args:
        figure: The figure; it keeps the title and the white ground.
        title: The text above all panels.

    Returns:
        The bytes of the PNG, and (width, height) in pixels.
    """
    figure.suptitle(
        title, fontsize=TITLE_POINTS, color=INK, y=1 - GAP_INCHES / figure.get_figheight()
    )
    figure.set_facecolor("white")
    _place_panels(figure)
    canvas = FigureCanvasAgg(figure)
    file = io.BytesIO()
    canvas.print_png(file, pil_kwargs={"compress_level": 1})  # a third of the time, not of the size
    return file.getvalue(), canvas.get_width_height()


def to_svg(figure: Figure, name: str) -> str:
    """Return an ``<svg>`` element with text as text, ``INK`` replaced by the page's text colour.

    Args:
        figure: The figure.
        name: Name in the ids of the element, which must be unique in a page.
    """
    _place_panels(figure)
    out = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata=no_metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    start, rest = text.split(">", 1)
    width = re.search(r'viewBox="0 0 ([\d.]+)', start)
    assert width is not None
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    # the size of the figure; the style of the page reduces it on narrow screens
    return f'{start} style="width:{float(width[1]) * 1.35:.0f}px">{rest}'


class _RoundLocator(LogLocator):
    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Return 1, 2, 5, 10, ... between two numbers."""
        return round_ticks(min(vmin, vmax), max(vmin, vmax))


def _make_round(axis: Axis) -> None:
    axis.set_major_locator(_RoundLocator())
    axis.set_minor_locator(NullLocator())


def _panels(height: float, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure((WIDTH_INCHES, height), dpi=DPI, facecolor="none")
    axes = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    for axis in axes:
        axis.set_facecolor("none")
        axis.tick_params(which="both", colors=INK, labelsize=TEXT_POINTS)
        axis.grid(True, color=INK, alpha=0.12, lw=0.7)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_edgecolor(INK)
            spine.set_alpha(0.4)
    return figure, axes


def _place_panels(figure: Figure) -> None:
    """Set the margins of the panels by the sizes of their texts.

    matplotlib's layout engines draw a figure several times for the same result.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    panels = [axis for axis in figure.axes if axis.get_label() != _BAR]
    letters = TEXT_POINTS / 72
    beside = TICK_INCHES + max(_label_widths(panels[0].yaxis, renderer))
    below = TICK_INCHES + 1.3 * letters
    left = GAP_INCHES + beside + (GAP_INCHES + letters) * bool(panels[0].get_ylabel())
    bottom = below + 2 * GAP_INCHES + letters * any(axis.get_xlabel() for axis in panels)
    bottom += LEGEND_INCHES if figure.legends else 0.0
    top = 1.5 * GAP_INCHES + TITLE_POINTS / 72 * bool(figure.get_suptitle())
    top += (GAP_INCHES + NAME_POINTS / 72) * any(axis.get_title() for axis in panels)
    # half of the first and last label of a horizontal axis stands beside the panel
    ends = [(w[0] / 2, w[-1] / 2) for w in (_label_widths(axis.xaxis, renderer) for axis in panels)]
    space = GAP_INCHES + max(first for first, _ in ends) + max(last for _, last in ends)
    right = GAP_INCHES + ends[-1][1]

    width, height = figure.get_size_inches()
    high = height - bottom - top
    for bar in set(figure.axes) - set(panels):
        beyond = TICK_INCHES + max(_label_widths(bar.yaxis, renderer)) + GAP_INCHES
        right = 2.5 * BAR_INCHES + beyond
        x = width - beyond - BAR_INCHES
        bar.set_position((x / width, bottom / height, BAR_INCHES / width, high / height))
    wide = (width - left - right - space * (len(panels) - 1)) / len(panels)
    for i, axis in enumerate(panels):
        x = left + i * (wide + space)
        axis.set_position((x / width, bottom / height, wide / width, high / height))
        axis.xaxis.set_label_coords(0.5, -(below + GAP_INCHES / 2) / high)
        axis.yaxis.set_label_coords(-(beside + GAP_INCHES / 2) / wide, 0.5)


def _label_widths(axis: Axis, renderer: RendererAgg) -> list[float]:
    """Return the widths in inches of the labels of an axis that are shown, the left one first.

    Args:
        axis: The axis.
        renderer: Measures texts.
    """
    font = FontProperties(size=TEXT_POINTS)
    low, high = sorted(axis.get_view_interval())
    locations = [x for x in axis.get_majorticklocs() if low <= x <= high]
    shown = sorted(locations, reverse=bool(axis.get_inverted()))
    labels = [text.replace(r"\$", "S") for text in axis.get_major_formatter().format_ticks(shown)]
    sizes = [renderer.get_text_width_height_descent(text, font, ismath=False) for text in labels]
    return [size[0] / renderer.dpi for size in sizes] or [0.0]
