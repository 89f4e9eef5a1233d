"""The pages of text in TensorBoard: about the run, and the advice of each report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fimprobe.estimators.names import ESTIMATORS
from fimprobe.report.format import one_line
from fimprobe.report.record import Record, describe_inputs, describe_labels
from fimprobe.report.report import Report
from fimprobe.report.run_info import format_run_info
from fimprobe.report.table import OPTIONAL_COLUMNS, footnotes, make_rows
from fimprobe.sinks.tensorboard.tags import DESCRIPTIONS

_FORMULAS = {
    "trace": "Σᵢ F̂ᵢᵢ",
    "std_error": "√Var(Σᵢ F̂ᵢᵢ)",
    "rel_error": "√(Σᵢ Var F̂ᵢᵢ) / ‖diag F‖",
    "one_label_error": "√(Σᵢ(V_label + V_input) / inputs) / ‖diag F‖",
    "label_variance": "Σᵢ E_x Var_y(F̂ᵢᵢ)",
    "input_variance": "Σᵢ Var_x(F_ii(x))",
    "pairs_for_10_percent": "Σᵢ(V_label + V_input) / (0.1 ‖diag F‖)²",
    "total_label_variance": "Σᵢⱼ E_x Var_y(F̂ᵢⱼ)",
    "covariance_norm": "‖Cov_y(F̂)‖_F",
    "bound": "Î₁: ‖J‖_F⁴ ‖M‖_F;  Î₂: ‖H‖_F² ‖I‖_F",
    "tightness": "bound / covariance_norm",
}

_MARKUP = re.compile(r"[\\`*\[\]|<>&~]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown and HTML may read as markup; an underscore within a word is none."""

MAX_LAYERS = 8
"""Layers in the table of a report."""


def about_page(
    report: Report, *, run: Mapping[str, Any], layers: Sequence[str], pictures: str
) -> str:
    """Return in Markdown what was measured, how, and how to read it.

    Args:
        report: The first report.
        run: The information on the run.
        layers: The layers with charts.
        pictures: A sentence on when pictures are drawn.
    """
    record = {
        "batch_size": report.batch_size,
        "draws": "exact" if report.draws is None else report.draws,
        "label_sampling": report.label_sampling,
    }
    sample = f"{describe_inputs(record)}, {describe_labels(record)}"
    coverage: dict[str, list[str]] = {}
    for name, how in report.coverage.items():
        coverage.setdefault(how, []).append(name)
    charted = ", ".join(map(_code, layers)) or "no layer"
    sections = [
        "# About this run",
        "fimprobe measures the Fisher information matrix F = E_x E_y (∂ log p/∂θ)(∂ log p/∂θ)ᵀ of "
        "the model as it trains, and **how far off its estimates are**.",
        "**Where to look.** CUSTOM SCALARS: the estimates with their uncertainty, by question (lines "
        "have the colour of their run; *Matches* below a chart names them by their marks). "
        "IMAGES: the errors of the layers over the steps. TEXT, *fimprobe/advice*: what to do. The "
        "relative error is the number to watch: 10 % is good, near 100 % the estimate is mostly "
        "noise.",
        f"**Measured.** {sample}; likelihood **{_escape(report.likelihood)}** "
        f"({_escape(str(run.get('decision', 'given')))}); {report.total.numel:,} parameters in "
        f"{len(report.layers)} layers. Layers with charts: {charted} (those that needed the most "
        "pairs at the first report); all others are in the pictures, the histograms and "
        f"`fimprobe.jsonl`. {pictures}",
        *_definitions(report),
        "## Coverage",
        _table(
            ("measured by", "parameters", "which"),
            [(_escape(how), str(len(names)), _some(names)) for how, names in coverage.items()],
        ),
        "## Configuration",
        _table(("what", "value"), [(k, _escape(v)) for k, v in format_run_info(run).items()]),
        f"```\n{_dump(run.get('config', {}))}\n```",
    ]
    return "\n\n".join(sections)


def _definitions(report: Report) -> list[str]:
    """Return the definitions of the measured estimators and of the charts."""
    measured = [e for key, e in ESTIMATORS.items() if report.total.get(key) is not None]
    charts = [
        (f"`{name}`", _escape(formula), _escape(DESCRIPTIONS[name]))
        for name, formula in _FORMULAS.items()
    ]
    return [
        "## Definitions",
        _table(("estimator", "what it is"), [(e.symbol, _escape(e.formula)) for e in measured]),
        "The charts of each estimator:",
        _table(("chart", "formula", "in words"), charts),
        "`std_error` and `rel_error` are the errors of the numbers of a report. `one_label_error` "
        "and `pairs_for_10_percent` describe an estimator with labels drawn from the model, for any "
        "labels of the measurement. Variances are those of one (input, label) pair. Unknown values "
        "are left out; *fimprobe/advice* gives the reason.",
    ]


def advice_page(record: Record) -> str:
    """Return the advice and the table of a report in Markdown."""
    advice = "\n".join(f"* {_escape(line)}" for line in record["advice"])
    head, *rows = make_rows(record, MAX_LAYERS)
    # with more cells words are broken
    shown = [i for i, name in enumerate(head) if name not in OPTIONAL_COLUMNS]
    table = _table([head[i] for i in shown], [[_escape(row[i]) for i in shown] for row in rows])
    lines = footnotes(record, MAX_LAYERS, without=OPTIONAL_COLUMNS)
    notes = "\n\n".join(["", *map(_escape, lines)])
    others = len(record["layers"]) - MAX_LAYERS
    more = f"\n\n{others} more layers need fewer pairs." if others > 0 else ""
    return f"## Step {record['step']}\n\n{advice}\n\n{table}{notes}{more}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _escape(text: str) -> str:
    """Return one line that Markdown shows as it is: markup as HTML's entities."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def _code(name: str) -> str:
    """Return a name in Markdown as code, or as text where a backtick or a bar would end it."""
    return _escape(name) if set(name) & set("`|\\") else f"`{one_line(name)}`"


def _dump(config: Any) -> str:
    """Return the configuration as YAML that does not end its block of code."""
    return yaml.safe_dump(config, sort_keys=False).strip().replace("```", "` ` `")


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(map(_code, names[:most]))
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
