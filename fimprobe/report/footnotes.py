"""The lines below a report's table: what its columns mean, and why values are unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fimprobe.estimators.names import SYMBOLS
from fimprobe.report.columns import Column, make_columns
from fimprobe.report.format import some
from fimprobe.report.layer_names import label_layers
from fimprobe.report.partial_reports import is_partial
from fimprobe.report.reasons import shared_reason, why_unknown, without_numbers
from fimprobe.report.record import (
    SIZE_BIASED,
    Record,
    describe_inputs,
    describe_labels,
    label_sampling_of,
    rank_layers,
)

MAX_REASONS = 6
"""Footnotes on unknown values; the record holds all."""


def footnotes(
    record: Record, top: int | None = None, *, view: str = "errors", without: Sequence[str] = ()
) -> list[str]:
    """Return the meaning of the columns, and the reasons for unknown values.

    Args:
        record: The record of a report.
        top: Number of layers in the table; None for all.
        view: One of ``VIEWS``.
        without: Heads of the columns that are not shown.
    """
    columns = [c for c in make_columns(record, view) if c.head not in without]
    names = _named(columns)
    if view in ("errors", "all") and "verdict" not in without:
        names.append("verdict")
    notes = explain(record, names) + _why_equal(record, columns)
    if not columns:
        notes.append(_why_no_bounds(record))
    notes += _missing_footnotes(record, columns, top)
    return notes


def _named(columns: Sequence[Column]) -> list[str]:
    """Return the names of the values in a table, and the symbols behind them in its head."""
    names = [part for column in columns for part in column.head.split(": ")]
    return list(dict.fromkeys("bound" if name.startswith("bound/") else name for name in names))


def _why_equal(record: Record, columns: Sequence[Column]) -> list[str]:
    """Return a line on why Î₁ and Î₂ agree where they do so in each row."""
    heads = {f"error: {SYMBOLS[key]}" for key in ("i1", "i2")}
    groups = [record["total"], *record["layers"].values()]
    if label_sampling_of(record) == "model" or not all(map(_agrees, groups)):
        return []
    if not heads <= {column.head for column in columns}:
        return []
    return [
        "Î₁ and Î₂ agree in each row: they differ by a term whose mean over labels is 0, which "
        f"{describe_labels(record)} allow to leave out. Their errors with 1 label differ"
    ]


def _agrees(group: Record) -> bool:
    """Return whether Î₁ and Î₂ of a layer have the same known trace and error."""
    if "i2" not in group:
        return False
    pairs = [(group["i1"].get(field), group["i2"].get(field)) for field in ("trace", "rel_error")]
    return all(None not in pair and math.isclose(*pair, rel_tol=1e-6) for pair in pairs)


def _why_no_bounds(record: Record) -> str:
    """Return why a report has no bound, and the setting that measures one."""
    left_out = [note for note in record.get("notes", []) if is_partial([note])]
    if left_out:
        return left_out[0]
    if not any("geometry" in group for group in record["layers"].values()):
        return "No bound was measured: pass bounds=True."
    reason = why_unknown(record, record["total"], "i1", "diagonal_tightness")
    return f"No bound can be compared with what it bounds: {reason or 'take more inputs'}."


def explain(record: Record, names: Sequence[str]) -> list[str]:
    """Return a sentence on each name in the head of a table that needs one.

    Args:
        record: The record of the report in the table, or of the last one.
        names: The names.
    """
    inputs, labels = describe_inputs(record), describe_labels(record)
    second = ", Î₂ minus the mean Hessian" if SYMBOLS["i2"] in names else ""
    meanings = {
        "trace F": "trace F: the sum of the diagonal of F, the Fisher information, ± its standard "
        f"error. Î₁ is the mean outer product of gradients of log p{second}; p is the model's "
        "probability of a label drawn from it",
        "error": f"error: the error of this report, how far off its F is with {inputs}, {labels}: "
        "the root-mean-square error of the diagonal's entries relative to their size. ± is that of "
        "their sum, usually smaller; 10 % is good, from 100 % on it is noise",
        "size-biased": SIZE_BIASED,
        "1 label": "1 label: the error with 1 label, how far off an estimator would be with one "
        f"label from the model for each of {inputs}",
        "pairs for 10 %": "pairs for 10 %: the (input, label) pairs, one label from the model for "
        "each input, that an error of 10 % takes",
        "label variance": "label variance: how much the diagonal of F from one (input, label) pair "
        "varies with its label",
        "input variance": "input variance: how much it varies with its input",
        "bound": "bound/...: a bound over the value that it bounds, 1 is equality. Bounded are the "
        "label variance of the diagonal and of the whole matrix, and the norm of the covariance "
        "(exact labels)",
        "verdict": "verdict: trusted where the error of Î₁ is at most 10 %, or the inputs that this "
        "takes, with labels as in this report",
    }
    if "error" in names and label_sampling_of(record) == "size_biased":
        names = [*names, "size-biased"]
    return [meaning for name, meaning in meanings.items() if name in names]


def _missing_footnotes(record: Record, columns: list[Column], top: int | None) -> list[str]:
    """Return one line for all rows that lack the same columns for the same cause."""
    labels = label_layers(record)
    rows = [("total", record["total"])]
    rows += [(labels[name], group) for name, group in rank_layers(record, top)]
    # reasons with the same cause differ by the numbers in their brackets
    missing: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for column in columns:
        for name, group in rows:
            for head, field in column.gaps(record, group):
                reason = why_unknown(record, group, column.key, field)
                if reason:
                    missing.setdefault((without_numbers(reason), head), []).append((name, reason))
    heads_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (cause, head), reasons in missing.items():
        heads_of.setdefault((cause, tuple(name for name, _ in reasons)), []).append(head)
    lines = []
    for (cause, names), heads in list(heads_of.items())[:MAX_REASONS]:
        values = "all numbers" if set(heads) == {c.head for c in columns} else ", ".join(heads)
        where = "everywhere" if len(names) == len(rows) > 2 else f"in {some(names)}"
        lines.append(f"– {values} {where}: {shared_reason(missing[cause, heads[0]])}")
    more = len(heads_of) - MAX_REASONS
    if more > 0:
        lines.append(f"– {more} more reason{'s' * (more > 1)} in the record, under 'unknown'")
    return lines
