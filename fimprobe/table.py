"""Reports as text: the table of layers, the trend of a run, two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

BARS = "▁▂▃▄▅▆▇█"

TRENDS = ("rel_error", "trace", "label_variance")
"""What is shown over steps, of Î₁."""

Row = tuple[str, ...]

LEAST = (
    "bound/Cov Î₂",
    "bound/Cov Î₁",
    "Î₂: V labels",
    "V inputs",
    "± s.e.",
    "parameters",
    "V labels",
)
"""Columns that narrow places go without, the first of these first; then from the right."""


def format_table(record: dict[str, Any], top: int | None = None) -> str:
    """The table of a report's ``to_dict``: layers by trace, relative error, variances, draws."""
    table = align(make_rows(record, top))
    rule = "-" * max(map(len, table))
    lines = [table[0], rule, *table[1:-1], rule, table[-1], *told_of_errors(record)]
    return "\n".join([headline(record), *lines, "", *record["advice"]])


def told_of_errors(record: dict[str, Any]) -> list[str]:
    """What the two kinds of errors in the table of exact labels are."""
    if record["draws"] != "exact":
        return []
    return [
        f"(rel. error: of F at these {record['batch_size']} inputs, labels integrated over, so from "
        "the choice of inputs alone; 1 label: of an estimator with one drawn label for each of them)"
    ]


def headline(record: dict[str, Any]) -> str:
    """A line that says what was measured, and how."""
    return (
        f"fimprobe · step {record['step']} · {record['batch_size']} inputs · draws "
        f"{record['draws']} · {record['likelihood']} · {record['seconds']:.3g} s"
    )


def make_rows(record: dict[str, Any], top: int | None = None) -> list[Row]:
    """The head, a row for each layer (the ``top`` that need most pairs), and the model's."""
    second = record["total"].get("i2") is not None
    exact = record["draws"] == "exact"
    layers = list(record["layers"].items())
    bounded = [  # ‖Cov‖ is known for exact labels only
        kind
        for kind in ("i1", "i2")
        if any(kind in g and g[kind]["tightness"] is not None for _, g in layers)
    ]
    head: Row = ("layer", "parameters", "trace F", "± s.e.", "rel. error")
    if exact:  # integrating over labels leaves the same error to all estimators: that of the inputs
        head += ("Î₁: 1 label", *["Î₂: 1 label"] * second)
    head += ("V labels", "V inputs", "pairs for 10 %")
    if second:
        head += ("Î₂: V labels",) if exact else ("Î₂: rel. error", "Î₂: V labels")
    head += tuple({"i1": "bound/Cov Î₁", "i2": "bound/Cov Î₂"}[kind] for kind in bounded)
    rows = [head]
    for name, group in [*neediest(record, top), ("total", record["total"])]:
        e, other = group["i1"], group.get("i2", {})
        row: Row = (name, f"{group['numel']:,}", number(e["trace"]), number(e["std_error"]))
        row += (percent(e["rel_error"]),)
        if exact:
            row += tuple(percent(drawn_error(record, x)) for x in (e, other)[: 1 + second])
        row += (number(e["label_variance"]), number(e["input_variance"]))
        row += (count(e["draws_for_10_percent"]),)
        if second:
            row += () if exact else (percent(other.get("rel_error")),)
            row += (number(other.get("label_variance")),)
        rows.append(row + tuple(number(group[kind]["tightness"]) for kind in bounded))
    return rows


def neediest(record: dict[str, Any], top: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The ``top`` layers that need most pairs, most first; all, in the model's order, if that few."""
    layers = list(record["layers"].items())
    if top is None or len(layers) <= top:
        return layers
    return sorted(layers, key=lambda x: -(x[1]["i1"]["draws_for_10_percent"] or 0))[:top]


def drawn_error(report: dict[str, Any], estimate: dict[str, Any]) -> float | None:
    """The relative error with labels drawn: as measured; for exact labels, with one for each input.

    √((V_x + V_y)/B)/‖diag F̂‖: what integrating over labels took out of ``rel_error`` is put back.
    """
    if report["draws"] != "exact":
        return estimate.get("rel_error")
    need = estimate.get("draws_for_10_percent")
    return None if need is None else 0.1 * (max(need, 0.0) / report["batch_size"]) ** 0.5


def drawn_labels(report: dict[str, Any]) -> str:
    """The inputs and labels that ``drawn_error`` is at."""
    draws = 1 if report["draws"] == "exact" else report["draws"]
    return f"{report['batch_size']} inputs, {draws} drawn label{'' if draws == 1 else 's'} each"


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
    exact = records[-1]["draws"] == "exact"
    table: list[Row] = [("step", "trace F", "rel. error", *["Î₁: 1 label"] * exact, "pairs for 10 %")]
    for record in thin(records, rows):
        e = record["total"]["i1"]
        row: Row = (f"{record['step']:,}", number(e["trace"]), percent(e["rel_error"]))
        row += (percent(drawn_error(record, e)),) if exact else ()
        table.append((*row, count(e["draws_for_10_percent"])))
    return "\n".join(align([tuple(cell.rjust(8) for cell in row) for row in table]))


def make_trends(records: list[dict[str, Any]], top: int = 8) -> list[Row]:
    """The head, and for the model and its neediest layers the trends of Î₁'s values."""
    error = "Î₁: 1 label" if records[-1]["draws"] == "exact" else "rel. error"
    rows: list[Row] = [("layer", error, "trace F", "V labels")]
    names = [name for name, _ in neediest(records[-1], top)]
    for name in ("total", *names):
        cells = []
        found = [(r, r["total"] if name == "total" else r["layers"].get(name)) for r in records]
        for value in TRENDS:
            values = [
                None
                if g is None
                else drawn_error(r, g["i1"])
                if value == "rel_error"
                else g["i1"][value]
                for r, g in found
            ]
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
    show = percent if name == "rel_error" else number
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
        "draws_for_10_percent": ("pairs for 10 %", count),
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


def count(x: float | None) -> str:
    """A number of pairs, at least one."""
    if x is None:
        return "–"
    return f"{max(x, 1):,.0f}" if x < 1e6 else f"{x:.2g}"
