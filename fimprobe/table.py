"""Reports as text: the table of layers, and the trend of a run."""

from __future__ import annotations

from typing import Any


def format_table(record: dict[str, Any], top: int | None = None) -> str:
    """The table of a report's ``to_dict``: layers by trace, relative error, variances, draws."""
    rows: list[tuple[str, ...]] = [
        (
            "layer",
            "parameters",
            "trace F",
            "± s.e.",
            "rel. error",
            "V labels",
            "V inputs",
            "pairs for 10 %",
        )
    ]
    second = record["total"].get("i2") is not None
    layers = list(record["layers"].items())
    bounded = [  # ‖Cov‖ is known for exact labels only
        kind
        for kind in ("i1", "i2")
        if any(kind in g and g[kind]["tightness"] is not None for _, g in layers)
    ]
    if second:
        rows[0] += ("Î₂: rel. error", "Î₂: V labels")
    rows[0] += tuple({"i1": "bound/Cov Î₁", "i2": "bound/Cov Î₂"}[kind] for kind in bounded)
    if top is not None and len(layers) > top:
        layers = sorted(layers, key=lambda x: -(x[1]["i1"]["draws_for_10_percent"] or 0))[:top]
    for name, group in [*layers, ("total", record["total"])]:
        e = group["i1"]
        rows.append(
            (
                name,
                f"{group['numel']:,}",
                number(e["trace"]),
                number(e["std_error"]),
                percent(e["rel_error"]),
                number(e["label_variance"]),
                number(e["input_variance"]),
                count(e["draws_for_10_percent"]),
            )
        )
        if second:
            other = group["i2"]
            rows[-1] += (percent(other["rel_error"]), number(other["label_variance"]))
        rows[-1] += tuple(number(group[kind]["tightness"]) for kind in bounded)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    head = (
        f"fimprobe · step {record['step']} · {record['batch_size']} inputs · draws "
        f"{record['draws']} · {record['likelihood']} · {record['seconds']:.3g} s"
    )
    return "\n".join([head, lines[0], rule, *lines[1:-1], rule, lines[-1], "", *record["advice"]])


def format_trend(records: list[dict[str, Any]], rows: int = 12) -> str:
    """The whole model's Î₁ over a run: up to ``rows`` reports, evenly spaced."""
    last = len(records) - 1
    shown = min(rows, len(records))
    picks = sorted({round(i * last / max(shown - 1, 1)) for i in range(shown)})
    lines = [f"{'step':>8}  {'trace F':>10}  {'rel. error':>10}  {'one pair':>10}  pairs for 10 %"]
    for i in picks:
        e = records[i]["total"]["i1"]
        need = e["draws_for_10_percent"]
        one = None if need is None else 0.1 * need**0.5
        lines.append(
            f"{records[i]['step']:>8}  {number(e['trace']):>10}  {percent(e['rel_error']):>10}"
            f"  {percent(one):>10}  {count(need):>14}"
        )
    lines.append("(one pair: relative error of Î₁ from a single input with a single drawn label)")
    return "\n".join(lines)


def number(x: float | None) -> str:
    """Three digits, or a dash.

    >>> number(1234.5), number(None)
    ('1.23e+03', '–')
    """
    return "–" if x is None else f"{x:.3g}"


def percent(x: float | None) -> str:
    """A share in percent."""
    return "–" if x is None else f"{100 * x:.3g} %"


def count(x: float | None) -> str:
    """A number of pairs, at least one."""
    if x is None:
        return "–"
    return f"{max(x, 1):,.0f}" if x < 1e6 else f"{x:.2g}"
