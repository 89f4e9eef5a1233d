"""The custom scalars dashboard: the charts of the tags that exist, in their order."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fimprobe.estimators.names import LAYER_KEYS, SYMBOLS, UNBIASED_KEYS
from fimprobe.sinks.tensorboard.tags import band_tags

MAX_BAND_CHARTS = 30
"""Charts with a band: with more the browser becomes slow."""

ONE_LABEL = ", 1 label from the model for each input"


class BandChart(NamedTuple):
    """A line with a band around it: tags of the value, the lower and the upper end."""

    title: str
    tags: tuple[str, str, str]


class LineChart(NamedTuple):
    """Several tags in one chart; each of the ``patterns`` matches a whole tag.

    TensorBoard draws charts that are the same in several runs once. What differs between runs (the
    names of layers) therefore stays out of the patterns where possible.
    """

    title: str
    patterns: list[str]


Chart = BandChart | LineChart


class Category(NamedTuple):
    """A titled group of charts, first to last."""

    title: str
    charts: Sequence[Chart]
    closed: bool = False


def make_dashboard(written: Collection[str], layers: Sequence[str]) -> list[Category]:
    """Return the charts: the whole model first, then its layers, then the cost.

    Args:
        written: The tags that exist.
        layers: The layers with charts.
    """
    cost = [
        *_line_chart(written, "Share of the probe in the wall time", ["fim_probe/overhead"]),
        *_line_chart(written, "Seconds of each measurement", ["fim_probe/seconds"]),
    ]
    categories = [
        Category("1 · How good are the estimates?", _total_charts(written)),
        Category("2 · Which layers have large errors?", _error_charts(written, layers)),
        Category("3 · Variance and its bound", _bound_charts(written)),
        Category("4 · Layers, with their uncertainty", _layer_charts(written, layers), closed=True),
        Category("5 · What the probe costs", cost, closed=True),
    ]
    return [category for category in categories if category.charts]


def _line_chart(written: Collection[str], title: str, tags: Sequence[str]) -> list[Chart]:
    """Return a chart of those tags that exist; none without any."""
    existing = [tag for tag in tags if tag in written]
    return [LineChart(title, [re.escape(tag) for tag in existing])] if existing else []


def _band_chart(
    written: Collection[str], title: str, key: str, layer: str | None = None
) -> list[Chart]:
    """Return a chart of a trace with its band; none where the trace does not exist."""
    tags = band_tags(key, layer)
    return [BandChart(title, tags)] if tags[0] in written else []


def _total_charts(written: Collection[str]) -> list[Chart]:
    """Return the charts of errors, pairs, traces and outputs of the whole model."""
    charts: list[Chart] = []
    for title, value in (
        (f"Relative error{ONE_LABEL} (0.1 good, 1 noise)", "one_label_error"),
        ("Relative error of this report's F", "rel_error"),
        ("(input, label) pairs needed for 10 % error", "pairs_for_10_percent"),
    ):
        tags = {key: f"fim/{key}/{value}" for key in UNBIASED_KEYS}
        symbols = ", ".join(SYMBOLS[key] for key, tag in tags.items() if tag in written)
        charts += _line_chart(written, f"{title}: {symbols}", list(tags.values()))
    for key in UNBIASED_KEYS:
        charts += _band_chart(written, f"Trace of F by {SYMBOLS[key]}, ± 2 standard errors", key)
    for title, tag in (
        ("tr I(h): the model is confident where it is small", "fim_outputs/fisher_trace"),
        ("‖M‖_F, the fourth moment of the outputs", "fim_outputs/moment_norm"),
    ):
        charts += _line_chart(written, title, [tag])
    return charts


def _error_charts(written: Collection[str], layers: Sequence[str]) -> list[Chart]:
    """Return the charts of the relative errors of all layers."""
    return [
        LineChart(
            f"Relative error of {SYMBOLS[key]} by layer{ONE_LABEL}",
            [f"fim_layers/.*/{key}_one_label_error"],
        )
        for key in LAYER_KEYS
        if any(f"fim_layers/{layer}/{key}_one_label_error" in written for layer in layers)
    ]


def _bound_charts(written: Collection[str]) -> list[Chart]:
    """Return the charts of variances and their bounds."""
    charts: list[Chart] = []
    for key in LAYER_KEYS:
        prefix, symbol = f"fim_log10/{key}/", SYMBOLS[key]
        charts += _line_chart(
            written,
            f"{symbol}: log10 label variance of diag F, above it its bound",
            [f"{prefix}label_variance", f"{prefix}diagonal_bound"],
        )
        charts += _line_chart(
            written,
            f"{symbol}: log10 label variance of all of F, above it its bound",
            [f"{prefix}total_label_variance", f"{prefix}trace_bound"],
        )
        if f"{prefix}covariance_norm" in written:  # with exact labels
            charts += _line_chart(
                written,
                f"{symbol}: log10 norm of Cov F, above it its bounds",
                [f"{prefix}covariance_norm", f"{prefix}sharp_bound", f"{prefix}bound"],
            )
    return charts


def _layer_charts(written: Collection[str], layers: Sequence[str]) -> list[Chart]:
    """Return the charts of the traces of the layers."""
    charts: list[Chart] = []
    for layer in layers:
        for key in LAYER_KEYS:
            title = f"{layer}: trace by {SYMBOLS[key]}, ± 2 standard errors"
            charts += _band_chart(written, title, key, layer)
    return charts
