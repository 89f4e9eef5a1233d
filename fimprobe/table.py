"""Reports as text: the table of layers, the trend of a run, two runs side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

BARS = "▁▂▃▄▅▆▇█"

TRENDS = ("one_label_error", "trace", "label_variance")
"""What is shown over steps, of Î₁."""

Row = tuple[str, ...]

LEAST = (
    "bound/Cov Î₂",
    "bound/Cov Î₁",
    "Î₂: V labels",
    "V inputs",
    "parameters",
    "V labels",
    "± s.e.",
)
"""Columns that narrow places go without, the first of these first; then from the right."""


def format_table(record: dict[str, Any], top: int | None = None) -> str:
    """The table of a report's ``to_dict``: layers by trace, relative error, variances, draws."""
    table = align(make_rows(record, top))
    rule = "-" * max(map(len, table))
    lines = [table[0], rule, *table[1:-1], rule, table[-1], *footnotes(record)]
    return "\n".join([headline(record), *lines, "", *record["advice"]])


def footnotes(record: dict[str, Any], most: int = 4) -> list[str]:
    """What the two kinds of errors in the table are, and why numbers are missing."""
    lines = [
        f"(rel. error: of this report's F, {labels_of(record)}; 1 label: of an estimator with one "
        f"label from the model for each of {inputs_of(record)}; pairs: of Î₁)"
    ]
    reasons: dict[str, tuple[str, list[str]]] = {}
    for name, group in [("total", record["total"]), *record["layers"].items()]:
        for kind in ("i1", "i2", "ih"):
            for reason in dict.fromkeys(group.get(kind, {}).get("unknown", {}).values()):
                # numbers stand in brackets: one line for all that lack the same thing
                _, where = reasons.setdefault(re.sub(r" \([^()]*\)", "", reason), (reason, []))
                if name not in where:
                    where.append(name)
    for reason, names in list(reasons.values())[:most]:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"(– unknown in {shown}: {reason})")
    if len(reasons) > most:
        lines.append(f"(– {len(reasons) - most} more reasons in the record, under 'unknown')")
    return lines


def labels_of(record: dict[str, Any]) -> str:
    """How the labels of a record came about.

    >>> labels_of({"draws": 2, "label_sampling": "size_biased"})
    '2 size-biased labels for each input'
    """
    if record["draws"] == "exact":
        return "labels integrated over"
    kind = "size-biased label" if record.get("label_sampling") == "size_biased" else "drawn label"
    return f"{record['draws']} {kind}{'' if record['draws'] == 1 else 's'} for each input"


def inputs_of(record: dict[str, Any]) -> str:
    """The number of inputs of a record, in words."""
    return f"{record['batch_size']:,} input{'' if record['batch_size'] == 1 else 's'}"


def headline(record: dict[str, Any]) -> str:
    """A line that says what was measured, and how."""
    outputs = record.get("outputs") or {}
    told = "".join(
        f" · {symbol} {number(outputs[name])}"
        for name, symbol in (
            ("fisher_trace", "tr I(h)"),
            ("fisher_norm", "‖I(h)‖"),
            ("moment_norm", "‖M‖"),
        )
        if outputs.get(name) is not None
    )
    return (
        f"fimprobe · step {record['step']} · {inputs_of(record)} · {labels_of(record)} · "
        f"{record['likelihood']}{told} · {record['seconds']:.3g} s"
    )


def make_rows(record: dict[str, Any], top: int | None = None) -> list[Row]:
    """The head, a row for each layer (the ``top`` that need most pairs), and the model's."""
    second = record["total"].get("i2") is not None
    layers = list(record["layers"].items())
    bounded = [  # ‖Cov‖ is known for exact labels only
        kind
        for kind in ("i1", "i2")
        if any(kind in g and g[kind]["tightness"] is not None for _, g in layers)
    ]
    head: Row = ("layer", "parameters", "trace F", "± s.e.", "rel. error", "Î₁: 1 label")
    head += ("Î₂: 1 label",) * second + ("pairs for 10 %", "V labels", "V inputs")
    head += ("Î₂: V labels",) * second
    head += tuple({"i1": "bound/Cov Î₁", "i2": "bound/Cov Î₂"}[kind] for kind in bounded)
    rows = [head]
    for name, group in [*neediest(record, top), ("total", record["total"])]:
        e, other = group["i1"], group.get("i2", {})
        row: Row = (name, f"{group['numel']:,}", number(e["trace"]), number(e["std_error"]))
        row += (percent(e["rel_error"]), percent(e.get("one_label_error")))
        row += (percent(other.get("one_label_error")),) * second
        row += (pairs(e), number(e["label_variance"]), number(e["input_variance"]))
        row += (number(other.get("label_variance")),) * second
        rows.append(row + tuple(number(group[kind]["tightness"]) for kind in bounded))
    return rows


def neediest(record: dict[str, Any], top: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The ``top`` layers that need most pairs, most first; all, in the model's order, if that few."""
    layers = list(record["layers"].items())
    if top is None or len(layers) <= top:
        return layers
    return sorted(layers, key=lambda x: -(x[1]["i1"]["pairs_for_10_percent"] or 0))[:top]


def one_label_error(estimate: dict[str, Any]) -> float | None:
    """The relative error of an estimator with one label from the model for each input."""
    return estimate.get("one_label_error")


def align(rows: Sequence[Row]) -> list[str]:
    """Lines of equal columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def format_trend(records: list[dict[str, Any]], rows: int = 12) -> str:
    """The whole model's Î₁ over a run: up to ``rows`` reports, evenly spaced."""
    table: list[Row] = [("step", "trace F", "rel. error", "Î₁: 1 label", "pairs for 10 %")]
    for record in thin(records, rows):
        e = record["total"]["i1"]
        row: Row = (f"{record['step']:,}", number(e["trace"]), percent(e["rel_error"]))
        table.append((*row, percent(one_label_error(e)), count(e["pairs_for_10_percent"])))
    return "\n".join(align([tuple(cell.rjust(8) for cell in row) for row in table]))


def make_trends(records: list[dict[str, Any]], top: int = 8) -> list[Row]:
    """The head, and for the model and its neediest layers the trends of Î₁'s values."""
    rows: list[Row] = [("layer", "Î₁: 1 label", "trace F", "V labels")]
    names = [name for name, _ in neediest(records[-1], top)]
    for name in ("total", *names):
        cells = []
        found = [r["total"] if name == "total" else r["layers"].get(name) for r in records]
        for value in TRENDS:
            values = [None if g is None else g["i1"].get(value) for g in found]
            cells.append(trend(values, value))
        rows.append((name, *cells))
    return rows


def format_trends(records: list[dict[str, Any]], top: int = 8) -> str:
    """``make_trends`` as lines."""
    rows = make_trends(records, top)
    first, last = records[0]["step"], records[-1]["step"]
    lines = [f"Î₁ from step {first} to {last} (a row's bars: from its least to its greatest, log)"]
    return "\n".join(lines + align(rows))


def trend(values: Sequence[float | None], name: str) -> str:
    """First value, bars, last value."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    show = percent if name.endswith("error") else number
    return f"{show(known[0]):>8} {sparkline(values)} {show(known[-1]):>8}"


def sparkline(values: Sequence[float | None], width: int = 16) -> str:
    """Bars on a logarithmic scale from the least to the greatest; blank where nothing is known.

    Values that are not above 0 count as the least.

    >>> sparkline([1, 10, 100, None, 1000, 0])
    '▁▃▆ █▁'
    >>> sparkline([2, 2, 2])
    '▄▄▄'
    """
    shown = thin(values, width)
    positive = [math.log(v) for v in shown if v is not None and v > 0]
    low, high = min(positive, default=0.0), max(positive, default=0.0)

    def bar(value: float | None) -> str:
        if value is None:
            return " "
        if high - low < 1e-9:
            return BARS[3]
        share = (math.log(value) - low) / (high - low) if value > 0 else 0.0
        return BARS[round(share * (len(BARS) - 1))]

    return "".join(map(bar, shown))


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` items, evenly spaced, the first and the last among them.

    >>> thin(range(10), 4)
    [0, 3, 6, 9]
    """
    last, shown = len(items) - 1, min(most, len(items))
    return [items[i] for i in sorted({round(i * last / max(shown - 1, 1)) for i in range(shown)})]


def make_comparison(a: dict[str, Any], b: dict[str, Any], top: int | None = None) -> list[Row]:
    """Î₁ of two reports by layer: A, B and B/A of trace, relative error, label variance, pairs."""
    columns = {
        "trace": ("trace F", number),
        "rel_error": ("rel. error", percent),
        "label_variance": ("V labels", number),
        "pairs_for_10_percent": ("pairs for 10 %", count),
    }
    rows: list[Row] = [("layer",)]
    for label, _ in columns.values():
        rows[0] += (f"{label}: A", "B", "B/A")
    names = [name for name, _ in neediest(a, top)]
    names += [name for name in b["layers"] if name not in a["layers"]][:top]
    pairs = [(name, a["layers"].get(name), b["layers"].get(name)) for name in names]
    for name, one, other in [*pairs, ("total", a["total"], b["total"])]:
        row: Row = (name,)
        for value, (_, show) in columns.items():
            x = None if one is None else one["i1"][value]
            y = None if other is None else other["i1"][value]
            row += (show(x), show(y), _ratio(y, x))
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
    differ("label sampling", a.get("label_sampling"), b.get("label_sampling"), noise)
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
    ratio = y / x
    return f"{ratio:.2g}×" if ratio < 100 or ratio >= 1e5 else f"{ratio:,.0f}×"


def number(x: float | None) -> str:
    """Three digits, or a dash.

    >>> number(1234.5), number(None)
    ('1.23e+03', '–')
    """
    return "–" if x is None else f"{x:.3g}"


def percent(x: float | None) -> str:
    """A share in percent.

    >>> percent(0.1234), percent(12.345)
    ('12.3 %', '1,234 %')
    """
    if x is None:
        return "–"
    return f"{100 * x:,.0f} %" if 10 <= x < 1e6 else f"{100 * x:.3g} %"


def pairs(estimate: dict[str, Any]) -> str:
    """The pairs for 10 %, with how well they are known.

    >>> pairs({"pairs_for_10_percent": 1622.0, "pairs_error": 0.12})
    '1,622 ± 12 %'
    """
    need, error = estimate.get("pairs_for_10_percent"), estimate.get("pairs_error")
    return count(need) if need is None or error is None else f"{count(need)} ± {percent(error)}"


def count(x: float | None) -> str:
    """A number of pairs, at least one."""
    if x is None:
        return "–"
    return f"{max(x, 1):,.0f}" if x < 1e6 else f"{x:.2g}"
