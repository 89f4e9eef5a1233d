"""A report: estimates grouped by parameter, layer and model, the advice, and the table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fimprobe.estimators import i1
from fimprobe.types import Estimate, GroupEstimates, MomentsBatch

ROOT = "(model)"
"""Layer name of parameters that the model itself holds."""


@dataclass(frozen=True)
class Report:
    """One measurement. Variances are per draw; ``std_error`` and ``rel_error`` at this size."""

    step: int
    batch_size: int
    draws: int | None
    """Labels drawn for each input; None: exact expectation."""
    seconds: float
    likelihood: str
    parameters: dict[str, GroupEstimates]
    layers: dict[str, GroupEstimates]
    total: GroupEstimates
    coverage: dict[str, str] = field(default_factory=dict)

    @property
    def advice(self) -> list[str]:
        """What the numbers say, in sentences."""
        lines = []
        need = self.total.i1.draws_for(0.1)
        have = self.batch_size * (self.draws or 1)
        drawn = "exact labels" if self.draws is None else f"{have} draws"
        if need is not None and self.total.i1.rel_error is not None:
            cause = " by the choice of inputs alone" if self.draws is None else ""
            lines.append(
                f"Î₁ of the whole model is off by {_percent(self.total.i1.rel_error)}{cause} at "
                f"{self.batch_size} inputs with {drawn}; 10 % takes {_count(need)} (input, label) "
                "pairs."
            )
        worst = max(
            (
                (group.i1.draws_for(0.1) or 0.0, name)
                for name, group in self.layers.items()
                if group.i1.norm > 0
            ),
            default=(0.0, ""),
        )
        if worst[0] > 0 and len(self.layers) > 1:
            lines.append(f"The layer that needs most is {worst[1]}: {_count(worst[0])} pairs.")
        labels, inputs = self.total.i1.label_variance, self.total.i1.input_variance
        if labels is not None and inputs is not None and inputs > 0 and self.draws is not None:
            best = (labels / inputs) ** 0.5
            side = (
                "more labels for each input help"
                if best > 2 * self.draws
                else "more inputs help, not more labels"
            )
            lines.append(
                f"Labels cause {labels / (labels + inputs):.0%} of the variance of one pair; {side} "
                f"(best number of labels for an input at equal cost: {max(best, 1):.2g})."
            )
        left = [f"{n} ({why[10:]})" for n, why in self.coverage.items() if why.startswith("left")]
        if left:
            shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            lines.append(f"Left out: {shown}.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Numbers and names only: what JSON can hold."""

        def group(g: GroupEstimates) -> dict[str, Any]:
            return {"numel": g.numel, "i1": _scalars(g.i1)}

        return {
            "step": self.step,
            "batch_size": self.batch_size,
            "draws": "exact" if self.draws is None else self.draws,
            "seconds": self.seconds,
            "likelihood": self.likelihood,
            "total": group(self.total),
            "layers": {name: group(g) for name, g in self.layers.items()},
            "parameters": {name: group(g) for name, g in self.parameters.items()},
            "coverage": self.coverage,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        """A table of the layers."""
        return format_table(self.to_dict())


def make_report(
    moments: MomentsBatch, *, step: int, seconds: float, likelihood: str, diagonals: bool
) -> Report:
    """Group the moments by parameter, by the layer that owns them, and over all."""
    layers: dict[str, list[str]] = {}
    for name in moments.parameters:
        layers.setdefault(name.rpartition(".")[0] or ROOT, []).append(name)

    groups = {f"parameter {n}": [n] for n in moments.parameters}
    groups |= {f"layer {n}": names for n, names in layers.items()}
    groups["total"] = list(moments.parameters)
    estimates = i1.estimate_groups(moments, groups, diagonals=diagonals)

    def group(key: str) -> GroupEstimates:
        numel = sum(moments.parameters[n].a2.numel() for n in groups[key])
        return GroupEstimates(numel, estimates[key])

    return Report(
        step=step,
        batch_size=moments.batch_size,
        draws=moments.draws,
        seconds=seconds,
        likelihood=likelihood,
        parameters={name: group(f"parameter {name}") for name in moments.parameters},
        layers={name: group(f"layer {name}") for name in layers},
        total=group("total"),
        coverage=moments.coverage,
    )


def format_table(record: dict[str, Any], top: int | None = None) -> str:
    """The table of a report's ``to_dict``: layers by trace, relative error, variances, draws."""
    rows = [
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
    layers = list(record["layers"].items())
    if top is not None and len(layers) > top:
        layers = sorted(layers, key=lambda x: -(x[1]["i1"]["draws_for_10_percent"] or 0))[:top]
    for name, group in [*layers, ("total", record["total"])]:
        e = group["i1"]
        rows.append(
            (
                name,
                f"{group['numel']:,}",
                _number(e["trace"]),
                _number(e["std_error"]),
                _percent(e["rel_error"]),
                _number(e["label_variance"]),
                _number(e["input_variance"]),
                _count(e["draws_for_10_percent"]),
            )
        )
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
    count = min(rows, len(records))
    picks = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    lines = [f"{'step':>8}  {'trace F':>10}  {'rel. error':>10}  {'one pair':>10}  pairs for 10 %"]
    for i in picks:
        e = records[i]["total"]["i1"]
        need = e["draws_for_10_percent"]
        one = None if need is None else 0.1 * need**0.5
        lines.append(
            f"{records[i]['step']:>8}  {_number(e['trace']):>10}  {_percent(e['rel_error']):>10}"
            f"  {_percent(one):>10}  {_count(need):>14}"
        )
    lines.append("(one pair: relative error of Î₁ from a single input with a single drawn label)")
    return "\n".join(lines)


def _scalars(e: Estimate) -> dict[str, Any]:
    values = {
        f.name: getattr(e, f.name) for f in dataclasses.fields(e) if not f.name.startswith("diagonal")
    }
    return values | {"draws_for_10_percent": e.draws_for(0.1)}


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.3g} %"


def _count(x: float | None) -> str:
    if x is None:
        return "–"
    return f"{max(x, 1):,.0f}" if x < 1e6 else f"{x:.2g}"
