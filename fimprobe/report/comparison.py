"""Two reports next to each other, and how their measurements differ."""

from __future__ import annotations

from collections.abc import Sequence

from fimprobe.estimators.names import KEYS
from fimprobe.report.columns import Column
from fimprobe.report.format import Row, count, factor, number, percent
from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import Record, label_sampling_of, rank_layers

COMPARED = (
    Column(head="trace F", key="i1", field="trace", show=number),
    Column(head="error", key="i1", field="rel_error", show=percent),
    Column(head="label variance", key="i1", field="label_variance", show=number),
    Column(head="pairs for 10 %", key="i1", field="pairs_for_10_percent", show=count),
)
"""The values of two runs."""


def make_comparison(
    a: Record, b: Record, top: int | None = None, *, columns: Sequence[Column] = COMPARED
) -> list[Row]:
    """Return Î₁ of two reports by layer: A, B and B/A of each value.

    Args:
        a: The record of report A.
        b: The record of report B.
        top: Number of layers, those that need the most pairs in A; None for all.
        columns: The values.
    """
    rows: list[Row] = [("layer",)]
    for column in columns:
        rows[0] += (f"{column.head}: A", "B", "B/A")
    names = [name for name, _ in rank_layers(a, top)]
    names += [name for name in b["layers"] if name not in a["layers"]][:top]
    labels = label_layers(b) | label_layers(a)
    groups = [(labels[name], a["layers"].get(name), b["layers"].get(name)) for name in names]
    for name, group_a, group_b in [*groups, ("total", a["total"], b["total"])]:
        row: Row = (name,)
        for column in columns:
            x = None if group_a is None else column.value(a, group_a)
            y = None if group_b is None else column.value(b, group_b)
            row += (column.show(x), column.show(y), _format_ratio(y, x))
        rows.append(row)
    return rows


def find_differences(a: Record, b: Record) -> list[str]:
    """Return the differences between the measurements of two reports.

    Args:
        a: The record of report A.
        b: The record of report B.

    Returns:
        One sentence for each difference.
    """
    sentences = []

    def compare(noun: str, x: object, y: object, effect: str) -> None:
        """Add a sentence if two values differ.

        Args:
            noun: Name of the value.
            x: The value of report A.
            y: The value of report B.
            effect: Consequence of a difference for the comparison.
        """
        if x != y:
            verb = "differ" if noun.split()[0].endswith("s") else "differs"
            sentences.append(f"{noun} {verb}: A {x}, B {y}; {effect}.")

    noise = "errors are those with these numbers, variances and pairs are of single pairs"
    compare("labels for each input", a["draws"], b["draws"], noise)
    sampling = label_sampling_of(a), label_sampling_of(b)
    if "exact" not in sampling:  # else the draws differ as well
        compare("label sampling", *sampling, "errors are those with these labels")
    compare("inputs", a["batch_size"], b["batch_size"], noise)
    two_models = "these are Fisher informations of two models"
    compare("likelihood", a["likelihood"], b["likelihood"], two_models)
    keys_a, keys_b = (", ".join(key for key in KEYS if key in r["total"]) for r in (a, b))
    compare("estimators", keys_a, keys_b, "only Î₁ is compared")
    compare("step", a["step"], b["step"], "the runs are compared at the last report of each")
    numels = a["total"]["numel"], b["total"]["numel"]
    compare("parameters", *numels, "traces grow with their number")
    only_a = ", ".join(name for name in a["layers"] if name not in b["layers"])
    only_b = ", ".join(name for name in b["layers"] if name not in a["layers"])
    if only_a or only_b:
        sentences.append(f"layers differ: only in A {only_a or '–'}; only in B {only_b or '–'}.")
    return sentences


def _format_ratio(y: float | None, x: float | None) -> str:
    """Return y/x, or a dash where one of them is not positive."""
    if x is None or y is None or x <= 0 or y <= 0:
        return "–"
    return f"{factor(y / x)}×"
