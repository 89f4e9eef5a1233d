"""The pages of text in TensorBoard: about the run, and the advice of each report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fimprobe.estimators.names import ESTIMATORS
from fimprobe.report.footnotes import footnotes
from fimprobe.report.format import one_line, quantity
from fimprobe.report.record import (
    FROZEN,
    Record,
    describe_hidden,
    describe_inputs,
    describe_labels,
)
from fimprobe.report.report import Report
from fimprobe.report.run_info import format_run_info
from fimprobe.report.table import make_rows

_MEANINGS = {
    "trace": ("the sum of the diagonal of F", "Σᵢ F̂ᵢᵢ"),
    "error_of_this_report": ("how far off its F is", "√(Σᵢ Var F̂ᵢᵢ) / size"),
    "error_with_1_label": (
        "how far off an estimator is with one label from the model for each input",
        "√((label_variance + input_variance) / inputs) / size",
    ),
    "label_variance": (
        "how much the diagonal of F from one (input, label) pair varies with its label",
        "Σᵢ E_x Var_y(F̂ᵢᵢ)",
    ),
    "input_variance": ("how much it varies with its input", "Σᵢ Var_x(F_ii(x))"),
    "pairs_for_10_percent": (
        "pairs that an error of 10 % takes",
        "(label_variance + input_variance) / (0.1 size)²",
    ),
    "total_label_variance": ("label variance of all entries of F", "Σᵢⱼ E_x Var_y(F̂ᵢⱼ)"),
    "covariance_norm": ("norm of the covariance over labels", "root of its sum of squares"),
    "bound_of_covariance_norm": (
        "its bound, Soen & Sun (2021), eq. 17 and 18",
        "Î₁: norms of the Jacobian and of the output fourth moment; Î₂: norms of the Hessian of the "
        "outputs and of the output Fisher",
    ),
}
"""Meaning and formula of each chart; size is the norm of the diagonal of F."""

_MARKUP = re.compile(r"[\\`*\[\]|<>&~]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown and HTML may read as markup; an underscore within a word is none."""

MAX_LAYERS = 8
"""Layers in the table of a report."""


def about_page(report: Report, *, run: Mapping[str, Any], tabs: str) -> str:
    """Return in Markdown what was measured, how, and how to read it.

    Args:
        report: The first report, or the first one with all estimators.
        run: The information on the run.
        tabs: Sentences on the other tabs that have content.
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
    sections = [
        "# About this run",
        "fimprobe measures the Fisher information matrix F = E_x E_y (∂ log p/∂θ)(∂ log p/∂θ)ᵀ of "
        "the model as it trains, and **how far off its estimates are**.",
        "**Where to look.** TIME SERIES and SCALARS: the first chart is the error, the number to "
        "watch: 0.1 is good, near 1 the estimate is mostly noise. Each estimator is a run of its own "
        f"({_runs(report)}) with one colour in every chart. {tabs} TEXT, *fimprobe/advice*: what to "
        "do.",
        "**Set Smoothing to 0**, and untick *Ignore outliers in chart scaling*: TensorBoard smooths "
        "lines by 0.6 at first, which shows values that are not those of a few reports.",
        f"**Measured.** {sample}; likelihood **{_escape(report.likelihood)}** "
        f"({_escape(str(run.get('decision', 'given')))}); {report.total.numel:,} parameters in "
        f"{quantity(len(report.layers), 'layer')}. `fimprobe.jsonl` holds every number.",
        *_definitions(report),
        "## Coverage",
        _table(
            ("measured by", "parameters", "which"),
            [
                (_escape(how), str(len(names)), "" if how == FROZEN else _some(names))
                for how, names in coverage.items()
            ],
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
        (f"`{name}`", _escape(words), _escape(formula))
        for name, (words, formula) in _MEANINGS.items()
    ]
    return [
        "## Definitions",
        _table(("estimator", "what it is"), [(e.symbol, _escape(e.formula)) for e in measured]),
        "The charts of each estimator; *size* is the root of the sum of squares of the diagonal of "
        "F:",
        _table(("chart", "what it is", "formula"), charts),
        "`error_of_this_report` is the error of its numbers. `error_with_1_label` and "
        "`pairs_for_10_percent` describe an estimator with labels drawn from the model, for any "
        "labels of the measurement. Variances are those of one (input, label) pair. Unknown values "
        "are left out; *fimprobe/advice* gives the reason.",
    ]


def _runs(report: Report) -> str:
    """Return the runs of the measured estimators with their symbols."""
    return ", ".join(
        f"*{key}* is {e.symbol}" for key, e in ESTIMATORS.items() if report.total.get(key) is not None
    )


def advice_page(record: Record) -> str:
    """Return the advice and the table of a report in Markdown."""
    advice = "\n".join(f"* {_escape(line)}" for line in record["advice"])
    head, *rows = make_rows(record, MAX_LAYERS)
    shown = [i for i, name in enumerate(head) if name != "parameters"]  # more cells are too narrow
    cells = [[_escape(row[0]), *(_unbroken(row[i]) for i in shown[1:])] for row in rows]
    table = _table([_unbroken(head[i]) for i in shown], cells)
    notes = "\n\n".join(["", *map(_escape, footnotes(record, MAX_LAYERS))])
    hidden = describe_hidden(record, MAX_LAYERS)
    more = f"\n\n({_escape(hidden)})" if hidden else ""
    return f"## Step {record['step']}\n\n{advice}\n\n{table}{notes}{more}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _escape(text: str) -> str:
    """Return one line that Markdown shows as it is: markup as HTML's entities."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def _unbroken(cell: str) -> str:
    """Return the text of a cell without breaks between its words, in Markdown."""
    return _escape(cell).replace(" ", "&nbsp;")


def _code(name: str) -> str:
    """Return a name in Markdown as code, or as text where a backtick or a bar would end it."""
    return _escape(name) if set(name) & set("`|\\") else f"`{one_line(name)}`"


def _dump(config: Any) -> str:
    """Return the configuration as YAML that does not end its block of code."""
    return yaml.safe_dump(config, sort_keys=False).strip().replace("```", "` ` `")


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(map(_code, names[:most]))
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
