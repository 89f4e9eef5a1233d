"""Reports as text: the table of layers, the trend of a run, two runs side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fimprobe.report.format import Row, align, count, number, percent, some, subsample, times, trend

OPTIONAL_COLUMNS = (
    "bound/Cov Î₂",
    "bound/Cov Î₁",
    "Î₂: V labels",
    "V inputs",
    "parameters",
    "V labels",
    "± s.e.",
)
"""Columns that narrow places go without, the first of these first; then from the right."""


class Column(NamedTuple):
    """A column of the table: a value of one estimator, None where it is not known."""

    head: str
    kind: str
    field: str
    show: Callable[[float | None], str]

    def value(self, record: dict[str, Any], group: dict[str, Any]) -> float | None:
        """Of one row."""
        estimate = group.get(self.kind, {})
        if self.field == "one_label_error":
            return one_label_error(estimate, record["batch_size"])
        if self.field == "pairs_for_10_percent":
            return need_of(estimate)
        value: float | None = estimate.get(self.field)
        return value

    def cell(self, record: dict[str, Any], group: dict[str, Any]) -> str:
        """As it is shown."""
        if self.field == "pairs_for_10_percent":
            return pairs(group.get(self.kind, {}))
        return self.show(self.value(record, group))


def format_table(record: dict[str, Any], top: int | None = None) -> str:
    """The table of a report's ``to_dict``: layers by trace, errors, pairs, variances, bounds."""
    table = align(make_rows(record, top))
    rule = "-" * max(map(len, table))
    lines = [table[0], rule, *table[1:-1], rule, table[-1], *footnotes(record, top)]
    return "\n".join([summary_line(record), *lines, "", *record["advice"]])


def footnotes(
    record: dict[str, Any], top: int | None = None, *, without: Sequence[str] = (), most: int = 6
) -> list[str]:
    """What the two kinds of errors in the table are, and why numbers in it are missing.

    ``without``: columns that are not shown.
    """
    lines = [
        f"rel. error: how far off this report's F is, with {labels_of(record)}",
        "1 label: how far off an estimator would be with one label from the model for each of "
        f"{inputs_of(record)}",
        "pairs for 10 %: (input, label) pairs, labels from the model, that Î₁ takes for an error of "
        "10 %",
    ]
    columns = [column for column in make_columns(record) if column.head not in without]
    rows = [("total", record["total"]), *rank_layers(record, top)]
    # numbers stand in brackets: one line for all rows that lack the same columns for one cause
    missing: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for column in columns:
        for name, group in rows:
            if column.value(record, group) is None:
                reason = why_unknown(record, group, column.kind, column.field)
                if reason:
                    key = without_numbers(reason), column.head
                    missing.setdefault(key, []).append((name, reason))
    told: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (cause, head), found in missing.items():
        told.setdefault((cause, tuple(name for name, _ in found)), []).append(head)
    for (cause, names), heads in list(told.items())[:most]:
        everything = len(heads) == len(columns)
        what = "all numbers" if everything else ", ".join(heads)
        where = "everywhere" if len(names) == len(rows) > 2 else f"in {some(names)}"
        lines.append(f"– {what} {where}: {shared_reason(missing[cause, heads[0]])}")
    more = len(told) - most
    if more > 0:
        lines.append(f"– {more} more reason{'s' * (more > 1)} in the record, under 'unknown'")
    return lines


def why_unknown(record: dict[str, Any], group: dict[str, Any], kind: str, field: str) -> str:
    """Why a value of the table is None, and what to do about it; empty where nobody knows.

    >>> record = {"draws": 2, "batch_size": 8}
    >>> group = {"i1": {"unknown": {"label_variance": "lost in its noise (1 ± 2)"}}}
    >>> why_unknown(record, group, "i1", "label_variance")
    "lost in its noise (1 ± 2); take more inputs, or draws='exact'"
    """
    estimate = group.get(kind, {})
    told = estimate.get("unknown", {})
    names = {
        "one_label_error": ("pairs",),
        "pairs_for_10_percent": ("pairs",),
        "rel_error": ("rel_error", "norm"),
        "tightness": ("covariance_norm", "bound"),
    }.get(field, (field,))
    reason: str = next((told[name] for name in names if name in told), "")
    if reason:
        if ";" in reason or "noise" not in reason:
            return reason
        if "random probes" in reason:
            return f"{reason}; take second_order={{'probes': ...}} with more of them"
        if kind == "i2" and estimate.get("probe_error"):
            return f"{reason}; take more inputs, or second_order={{'probes': ...}}"
        return f"{reason}; take more inputs" + (
            "" if record["draws"] == "exact" else ", or draws='exact'"
        )
    if "unknown" not in estimate or field in ("trace", "std_error", "rel_error"):
        return ""
    if field == "tightness":
        none = estimate.get("covariance_norm") == 0
        return "labels add no covariance that a bound could be compared with" if none else ""
    if record["draws"] == 1:
        return "one label for each input does not tell it; take draws=2 or more"
    return "one input does not tell it; take more" if record["batch_size"] == 1 else ""


def without_numbers(reason: str) -> str:
    """A reason without what stands in brackets: the same for all that have the same cause."""
    return re.sub(r" \([^()]*\)", "", reason)


def shared_reason(found: Sequence[tuple[str, str]]) -> str:
    """The reason of several (name, reason) with one cause; its numbers are those of the first.

    >>> shared_reason([("fc", "too few (2 of 8); take more"), ("out", "too few (3 of 8); take more")])
    'too few (2 of 8 in fc); take more'
    """
    (name, reason), *others = found
    if all(other == reason for _, other in others):
        return reason
    return re.sub(r" \(([^()]*)\)", lambda found: f" ({found[1]} in {name})", reason, count=1)


def labels_of(record: dict[str, Any]) -> str:
    """How the labels of a record came about.

    >>> labels_of({"draws": 2, "label_sampling": "size_biased"})
    '2 size-biased labels for each input'
    >>> labels_of({"draws": 1})
    '1 label from the model for each input'
    """
    if record["draws"] == "exact":
        return "exact labels"
    what = "label" if record["draws"] == 1 else "labels"
    kind = f"size-biased {what}" if sampling_of(record) == "size_biased" else f"{what} from the model"
    return f"{record['draws']} {kind} for each input"


def sampling_of(record: dict[str, Any]) -> str:
    """Which labels a record was measured with; those of older versions were the model's."""
    found = record.get("label_sampling")
    return found or ("exact" if record["draws"] == "exact" else "model")


def inputs_of(record: dict[str, Any]) -> str:
    """The number of inputs of a record, in words."""
    return f"{record['batch_size']:,} input{'' if record['batch_size'] == 1 else 's'}"


def summary_line(record: dict[str, Any]) -> str:
    """A line that says what was measured, and how."""
    outputs = record.get("outputs") or {}
    names = {"fisher_trace": "tr I(h)", "fisher_norm": "‖I(h)‖", "moment_norm": "‖M‖"}
    told = [
        f"{symbol} {number(outputs[name])}"
        for name, symbol in names.items()
        if outputs.get(name) is not None
    ]
    return " · ".join(
        [
            f"fimprobe · step {record['step']:,}",
            f"{inputs_of(record)}, {labels_of(record)}",
            record["likelihood"],
            *([f"outputs: {', '.join(told)}"] if told else []),
            f"{record['seconds']:.3g} s",
        ]
    )


def make_columns(record: dict[str, Any]) -> list[Column]:
    """What the table of a record shows of each layer; ‖Cov‖ is known for exact labels only."""
    groups = [record["total"], *record["layers"].values()]
    second = record["total"].get("i2") is not None
    columns = [
        Column("trace F", "i1", "trace", number),
        Column("± s.e.", "i1", "std_error", number),
        Column("rel. error", "i1", "rel_error", percent),
        Column("Î₁: 1 label", "i1", "one_label_error", percent),
        *[Column("Î₂: 1 label", "i2", "one_label_error", percent)] * second,
        Column("pairs for 10 %", "i1", "pairs_for_10_percent", count),
        Column("V labels", "i1", "label_variance", number),
        Column("V inputs", "i1", "input_variance", number),
        *[Column("Î₂: V labels", "i2", "label_variance", number)] * second,
    ]
    for kind, name in (("i1", "Î₁"), ("i2", "Î₂")):
        if any(g.get(kind, {}).get("tightness") is not None for g in groups):
            columns.append(Column(f"bound/Cov {name}", kind, "tightness", number))
    return columns


def make_rows(record: dict[str, Any], top: int | None = None) -> list[Row]:
    """The head, a row for each layer (the ``top`` that need most pairs), and the model's."""
    columns = make_columns(record)
    rows: list[Row] = [("layer", "parameters", *[column.head for column in columns])]
    for name, group in [*rank_layers(record, top), ("total", record["total"])]:
        cells = [column.cell(record, group) for column in columns]
        rows.append((name, f"{group['numel']:,}", *cells))
    return rows


def rank_layers(record: dict[str, Any], top: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The ``top`` layers that need most pairs, most first; all, in the model's order, if that few."""
    layers = list(record["layers"].items())
    if top is None or len(layers) <= top:
        return layers
    return sorted(layers, key=lambda x: -(need_of(x[1]["i1"]) or 0))[:top]


def need_of(estimate: dict[str, Any]) -> float | None:
    """(input, label) pairs for 10 %, also of files that older versions wrote."""
    found: float | None = estimate.get("pairs_for_10_percent", estimate.get("draws_for_10_percent"))
    return found


def one_label_error(estimate: dict[str, Any], inputs: int) -> float | None:
    """The relative error of an estimator with one label from the model for each input.

    >>> one_label_error({"draws_for_10_percent": 800.0}, 8)  # of a file that an older version wrote
    1.0
    """
    if "one_label_error" in estimate:
        found: float | None = estimate["one_label_error"]
        return found
    need = need_of(estimate)
    return None if need is None else 0.1 * (max(need, 0.0) / inputs) ** 0.5


def format_trend(records: list[dict[str, Any]], rows: int = 12) -> str:
    """The whole model's Î₁ over a run: up to ``rows`` reports, evenly spaced."""
    table: list[Row] = [("step", "trace F", "rel. error", "Î₁: 1 label", "pairs for 10 %")]
    for record in subsample(records, rows):
        e = record["total"]["i1"]
        row: Row = (f"{record['step']:,}", number(e["trace"]), percent(e["rel_error"]))
        error = one_label_error(e, record["batch_size"])
        table.append((*row, percent(error), count(need_of(e))))
    return "\n".join(align([tuple(cell.rjust(8) for cell in row) for row in table]))


def make_trends(records: list[dict[str, Any]], top: int = 8) -> list[Row]:
    """The head, and for the model and its neediest layers the trends of Î₁'s values."""
    rows: list[Row] = [("layer", *[column.head for column in TRENDS])]
    names = [name for name, _ in rank_layers(records[-1], top)]
    for name in ("total", *names):
        found = [(r, r["total"] if name == "total" else r["layers"].get(name)) for r in records]
        series = [[None if g is None else c.value(r, g) for r, g in found] for c in TRENDS]
        cells = [trend(v, c.show) for v, c in zip(series, TRENDS, strict=True)]
        rows.append((name, *cells))
    return rows


def format_trends(records: list[dict[str, Any]], top: int = 8) -> str:
    """``make_trends`` as lines."""
    rows = make_trends(records, top)
    first, last = records[0]["step"], records[-1]["step"]
    lines = [
        f"Î₁ from step {first:,} to {last:,} (a row's bars: from its least to its greatest, log)"
    ]
    return "\n".join(lines + align(rows))


def make_comparison(a: dict[str, Any], b: dict[str, Any], top: int | None = None) -> list[Row]:
    """Î₁ of two reports by layer: A, B and B/A of trace, relative error, label variance, pairs."""
    rows: list[Row] = [("layer",)]
    for column in COMPARED:
        rows[0] += (f"{column.head}: A", "B", "B/A")
    names = [name for name, _ in rank_layers(a, top)]
    names += [name for name in b["layers"] if name not in a["layers"]][:top]
    both = [(name, a["layers"].get(name), b["layers"].get(name)) for name in names]
    for name, one, other in [*both, ("total", a["total"], b["total"])]:
        row: Row = (name,)
        for column in COMPARED:
            x = None if one is None else column.value(a, one)
            y = None if other is None else column.value(b, other)
            row += (column.show(x), column.show(y), _ratio(y, x))
        rows.append(row)
    return rows


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """How two reports were measured differently, a sentence each: what makes them not comparable."""
    found = []

    def differ(what: str, x: object, y: object, why: str) -> None:
        if x != y:
            found.append(f"{what} differ{'' if what[-1] == 's' else 's'}: A {x}, B {y}; {why}.")

    noise = "errors are at these numbers, variances and pairs are per pair"
    differ("draws", a["draws"], b["draws"], noise)
    x, y = sampling_of(a), sampling_of(b)
    if "exact" not in (x, y):  # else the draws tell it
        differ("label sampling", x, y, "rel. errors are at these labels")
    differ("inputs", a["batch_size"], b["batch_size"], noise)
    differ(
        "likelihood", a["likelihood"], b["likelihood"], "these are Fisher informations of two models"
    )
    kinds = ("i1", "i2", "ih", "empirical")
    x, y = (", ".join(k for k in kinds if k in r["total"]) for r in (a, b))
    differ("estimators", x, y, "only Î₁ is compared")
    differ("step", a["step"], b["step"], "the runs are compared at the last report of each")
    differ("parameters", a["total"]["numel"], b["total"]["numel"], "traces grow with their number")
    x, y = (", ".join(n for n in r["layers"] if n not in o["layers"]) for r, o in ((a, b), (b, a)))
    if x or y:
        found.append(f"layers differ: only in A {x or '–'}; only in B {y or '–'}.")
    return found


def _ratio(y: float | None, x: float | None) -> str:
    """A quotient, where both are above 0."""
    if x is None or y is None or x <= 0 or y <= 0:
        return "–"
    return times(y / x)


def pairs(estimate: dict[str, Any]) -> str:
    """The pairs for 10 %, with how well they are known.

    >>> pairs({"pairs_for_10_percent": 1622.0, "pairs_error": 0.1234})
    '1,622 ± 12 %'
    """
    need, error = need_of(estimate), estimate.get("pairs_error")
    if need is None or error is None:
        return count(need)
    return f"{count(need)} ± {percent(float(f'{error:.2g}'))}"


TRENDS = (
    Column("Î₁: 1 label", "i1", "one_label_error", percent),
    Column("trace F", "i1", "trace", number),
    Column("V labels", "i1", "label_variance", number),
)
"""What is shown over steps."""


COMPARED = (
    Column("trace F", "i1", "trace", number),
    Column("rel. error", "i1", "rel_error", percent),
    Column("V labels", "i1", "label_variance", number),
    Column("pairs for 10 %", "i1", "pairs_for_10_percent", count),
)
"""What is shown of two runs."""
