"""The custom scalars dashboard: which charts, in which order, of the tags that exist."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from fimprobe.sinks.tags import KINDS, band

MOST_MARGINS = 30
"""Charts with a band: more make the browser slow."""


class Margin(NamedTuple):
    """A line with a band around it: tags of the value, the lower and the upper end."""

    title: str
    tags: tuple[str, str, str]


class Lines(NamedTuple):
    """Several tags in one chart."""

    title: str
    tags: list[str]


class Category(NamedTuple):
    """A box of charts, first to last."""

    title: str
    charts: Sequence[Margin | Lines]
    closed: bool = False


def make_dashboard(written: Collection[str], layers: Sequence[str]) -> list[Category]:
    """Charts of the tags in ``written``: the model first, then its ``layers``, then the cost."""

    def lines(title: str, tags: list[str]) -> list[Margin | Lines]:
        there = [tag for tag in tags if tag in written]
        return [Lines(title, there)] if there else []

    def margins(title: str, kind: str, layer: str | None = None) -> list[Margin | Lines]:
        tags = band(kind, layer)
        return [Margin(title, tags)] if tags[0] in written else []

    totals: list[Margin | Lines] = []
    compared = ("i1", "i2", "ih")
    exact = "fim/i1/one_label_error" in written
    error, size = ("one_label_error", " with one drawn label each") if exact else ("rel_error", "")
    known = ", ".join(KINDS[k] for k in compared if f"fim/{k}/{error}" in written)
    totals += lines(f"Relative error{size}: {known}", [f"fim/{k}/{error}" for k in compared])
    if exact:  # the same for all of them
        totals += lines("Relative error, all labels integrated over", ["fim/i1/rel_error"])
    totals += lines(
        "(input, label) pairs needed for 10 % error",
        [f"fim/{k}/pairs_for_10_percent" for k in compared],
    )
    for kind in compared:
        totals += margins(f"Trace of F by {KINDS[kind]}, ± 2 standard errors", kind)
    bounds: list[Margin | Lines] = []
    for kind in ("i1", "i2"):
        prefix = f"fim_log10/{kind}/"
        bounds += lines(
            f"{KINDS[kind]}: log10 of the diagonal's label variance and its bound",
            [f"{prefix}label_variance", f"{prefix}diagonal_bound"],
        )
        bounds += lines(
            f"{KINDS[kind]}: log10 of the whole matrix' label variance and its bound",
            [f"{prefix}total_label_variance", f"{prefix}trace_bound"],
        )
        bounds += lines(
            f"{KINDS[kind]}: log10 of the covariance's norm and its bounds",
            [f"{prefix}covariance_norm", f"{prefix}sharp_bound", f"{prefix}bound"],
        )
    worst: list[Margin | Lines] = []
    for kind in ("i1", "i2"):
        worst += lines(
            f"Relative error of {KINDS[kind]} by layer{size}",
            [f"fim_layers/{layer}/{kind}_{error}" for layer in layers],
        )
    each: list[Margin | Lines] = []
    for layer in layers:
        for kind in ("i1", "i2"):
            each += margins(f"{layer}: trace by {KINDS[kind]}, ± 2 standard errors", kind, layer)
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
