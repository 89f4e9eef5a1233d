"""Two reports next to each other, and how their measurements differ."""

from __future__ import annotations

from collections.abc import Sequence

from fimprobe.estimators.names import KEYS
from fimprobe.report.columns import Column
from fimprobe.report.format import Row, factor, percent, some
from fimprobe.report.layer_names import label_layers, layer_classes
from fimprobe.report.record import Record, label_sampling_of, rank_layers

COMPARED = (
    Column(head="trace F", key="i1", field="trace", error_field="std_error"),
    Column(head="error", key="i1", field="rel_error", show=percent),
    Column(
        head="label variance", key="i1", field="label_variance", error_field="label_variance_error"
    ),
    Column(head="pairs for 10 %", key="i1", field="pairs_for_10_percent", error_field="pairs_error"),
)
"""The values of two runs."""

MAX_NAMES = 8
"""Layers of one run alone that are named."""


def make_comparison(
    a: Record, b: Record, top: int | None = None, *, columns: Sequence[Column] = COMPARED
) -> list[Row]:
    """Return Î₁ of two reports by layer: A, B and B/A of each value.

    Layers of the same name are one row, unless their classes are known and differ: a number in a
    ``Sequential`` names layers that may have nothing in common.

    Args:
        a: The record of report A.
        b: The record of report B.
        top: Number of layers, those that need the most inputs in A; None for all.
        columns: The values.
    """
    rows: list[Row] = [("layer",)]
    for column in columns:
        rows[0] += (f"{column.head}: A", "B", "B/A")
    labels, labels_b, shared = label_layers(a), label_layers(b), _shared_layers(a, b)
    groups: list[tuple[str, Record | None, Record | None]] = [
        (labels[name], group, b["layers"][name] if name in shared else None)
        for name, group in rank_layers(a, top)
    ]
    only_b = [name for name in b["layers"] if name not in shared]
    groups += [(labels_b[name], None, b["layers"][name]) for name in only_b[:top]]
    for name, group_a, group_b in [*groups, ("total", a["total"], b["total"])]:
        row: Row = (name,)
        for column in columns:
            x = None if group_a is None else column.value(a, group_a)
            y = None if group_b is None else column.value(b, group_b)
            shown_a = "–" if group_a is None else column.brief(a, group_a)
            shown_b = "–" if group_b is None else column.brief(b, group_b)
            row += (shown_a, shown_b, _format_ratio(y, x))
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
            a_and_b = [f"{value:,}" if isinstance(value, int) else value for value in (x, y)]
            sentences.append(f"{noun} {verb}: A {a_and_b[0]}, B {a_and_b[1]}; {effect}.")

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
    shared = _shared_layers(a, b)
    only = [
        some([label for name, label in label_layers(r).items() if name not in shared], MAX_NAMES)
        for r in (a, b)
    ]
    if any(only):
        sentences.append(f"layers differ: only in A {only[0] or '–'}; only in B {only[1] or '–'}.")
    return sentences


def _shared_layers(a: Record, b: Record) -> set[str]:
    """Return the names of the layers that are compared: in both reports, of the same class."""
    classes_a, classes_b = layer_classes(a), layer_classes(b)
    return {
        name
        for name in a["layers"]
        if name in b["layers"]
        and classes_a.get(name, classes_b.get(name)) == classes_b.get(name, classes_a.get(name))
    }


def _format_ratio(y: float | None, x: float | None) -> str:
    """Return y/x, or a dash where one of them is not positive."""
    if x is None or y is None or x <= 0 or y <= 0:
        return "–"
    return f"{factor(y / x)}×"
