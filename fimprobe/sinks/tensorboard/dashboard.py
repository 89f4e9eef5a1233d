"""The custom scalars dashboard: which charts, in which order, of the tags that exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fimprobe.sinks.tensorboard.tags import KINDS, band

MOST_MARGINS = 30
"""Charts with a band: more make the browser slow."""


class BandChart(NamedTuple):
    """A line with a band around it: tags of the value, the lower and the upper end."""

    title: str
    tags: tuple[str, str, str]


class LineChart(NamedTuple):
    """Several tags in one chart; ``patterns`` match the whole of them.

    TensorBoard draws charts that are the same in several runs once, so what differs between runs (the
    layers' names) stays out of patterns where it can.
    """

    title: str
    patterns: list[str]


class Category(NamedTuple):
    """A box of charts, first to last."""

    title: str
    charts: Sequence[BandChart | LineChart]
    closed: bool = False


def make_dashboard(written: Collection[str], layers: Sequence[str]) -> list[Category]:
    """Charts of the tags in ``written``: the model first, then its ``layers``, then the cost."""

    def lines(title: str, tags: list[str]) -> list[BandChart | LineChart]:
        there = [tag for tag in tags if tag in written]
        return [LineChart(title, [re.escape(tag) for tag in there])] if there else []

    def margins(title: str, kind: str, layer: str | None = None) -> list[BandChart | LineChart]:
        tags = band(kind, layer)
        return [BandChart(title, tags)] if tags[0] in written else []

    totals: list[BandChart | LineChart] = []
    compared = ("i1", "i2", "ih")
    error, size = "one_label_error", ", 1 label from the model for each input"

    def known(value: str) -> str:
        there = [kind for kind in compared if f"fim/{kind}/{value}" in written]
        return ", ".join(KINDS[kind] for kind in there)

    totals += lines(
        f"Relative error{size} (0.1 good, 1 noise): {known(error)}",
        [f"fim/{k}/{error}" for k in compared],
    )
    totals += lines(
        f"Relative error of this report's F: {known('rel_error')}",
        [f"fim/{k}/rel_error" for k in compared],
    )
    need = "pairs_for_10_percent"
    totals += lines(
        f"(input, label) pairs needed for 10 % error: {known(need)}",
        [f"fim/{k}/{need}" for k in compared],
    )
    for kind in compared:
        totals += margins(f"Trace of F by {KINDS[kind]}, ± 2 standard errors", kind)
    bounds: list[BandChart | LineChart] = []
    for kind in ("i1", "i2"):
        prefix = f"fim_log10/{kind}/"
        bounds += lines(
            f"{KINDS[kind]}: log10 label variance of diag F, above it its bound",
            [f"{prefix}label_variance", f"{prefix}diagonal_bound"],
        )
        bounds += lines(
            f"{KINDS[kind]}: log10 label variance of all of F, above it its bound",
            [f"{prefix}total_label_variance", f"{prefix}trace_bound"],
        )
        if f"{prefix}covariance_norm" in written:  # of exact labels
            bounds += lines(
                f"{KINDS[kind]}: log10 norm of Cov F, above it its bounds",
                [f"{prefix}covariance_norm", f"{prefix}sharp_bound", f"{prefix}bound"],
            )
    worst: list[BandChart | LineChart] = []
    for kind in ("i1", "i2"):
        if any(f"fim_layers/{layer}/{kind}_{error}" in written for layer in layers):
            title = f"Relative error of {KINDS[kind]} by layer{size}"
            worst.append(LineChart(title, [f"fim_layers/.*/{kind}_{error}"]))
    each: list[BandChart | LineChart] = []
    for layer in layers:
        for kind in ("i1", "i2"):
            each += margins(f"{layer}: trace by {KINDS[kind]}, ± 2 standard errors", kind, layer)
    outputs = lines("tr I(h): the model is confident where it is small", ["fim_outputs/fisher_trace"])
    outputs += lines("‖M‖_F, the fourth moment of the outputs", ["fim_outputs/moment_norm"])
    totals += outputs
    cost = lines("Share of the wall time that the probe took", ["fim_probe/overhead"])
    cost += lines("Seconds of each measurement", ["fim_probe/seconds"])
    found = [
        Category("1 · How good are the estimates?", totals),
        Category("2 · Which layers err?", worst),
        Category("3 · Variance beside its bound", bounds),
        Category("4 · Layers, with their uncertainty", each, closed=True),
        Category("5 · What the probe costs", cost, closed=True),
    ]
    return [category for category in found if category.charts]
