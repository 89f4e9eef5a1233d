"""Pages of text for TensorBoard: about a run, and what each report says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fimprobe.report.report import Report
from fimprobe.report.run_info import format_run_info
from fimprobe.report.table import OPTIONAL_COLUMNS, footnotes, inputs_of, labels_of, make_rows
from fimprobe.sinks.tensorboard.tags import KINDS, MEANING

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

_ESTIMATORS = {
    "i1": "mean of (∂ log p(y\\|x) / ∂θ) (∂ log p(y\\|x) / ∂θ)ᵀ, y drawn from the model",
    "i2": "− mean of ∂² log p(y\\|x) / ∂θ∂θᵀ, y drawn from the model",
    "ih": "mean of (Jᵀ L ξ)(Jᵀ L ξ)ᵀ, LLᵀ = I(h), ξ random signs",
    "empirical": "as Î₁, with the labels of the data (biased: not F)",
}


def about_page(
    report: Report, *, run: Mapping[str, Any], layers: Sequence[str], pictures: str
) -> str:
    """What was measured, how, and how to read it, in Markdown."""
    record = {
        "batch_size": report.batch_size,
        "draws": "exact" if report.draws is None else report.draws,
        "label_sampling": report.label_sampling,
    }
    size = f"{inputs_of(record)}, {labels_of(record)}"
    kinds = [k for k in KINDS if getattr(report.total, k) is not None]
    ways: dict[str, list[str]] = {}
    for name, how in report.coverage.items():
        ways.setdefault(how, []).append(name)
    lines = [
        "# About this run",
        "fimprobe measures the Fisher information matrix F = E_x E_y (∂ log p/∂θ)(∂ log p/∂θ)ᵀ of "
        "the model as it trains, and **how far off its estimates are**.",
        "**Where to look.** CUSTOM SCALARS: the estimates with their uncertainty, by question (lines "
        "have the colour of their run; *Matches* below a chart names them by their marks). "
        "IMAGES: which layers err, when. TEXT, *fimprobe/advice*: what to do. The relative error is "
        "the number to watch: 10 % is good, near 100 % the estimate is mostly noise.",
        f"**Measured.** {size}; likelihood **{report.likelihood}** "
        f"({run.get('decision', 'given')}); {report.total.numel:,} parameters in "
        f"{len(report.layers)} layers. Charts of their own: "
        f"{', '.join(f'`{n}`' for n in layers) or 'no layer'} (those that "
        "needed most pairs at the first report); all others are in the pictures, the histograms and "
        f"`fimprobe.jsonl`. {pictures}",
        "## Definitions",
        _table(("estimator", "what it is"), [(KINDS[k], _ESTIMATORS[k]) for k in kinds]),
        "What the charts show of each:",
        _table(
            ("chart", "formula", "in words"),
            [
                (f"`{name}`", formula.replace("|", "\\|"), MEANING[name].replace("|", "\\|"))
                for name, formula in _FORMULAS.items()
            ],
        ),
        "`std_error` and `rel_error` tell how far off the numbers of a report are; `one_label_error` "
        "and `pairs_for_10_percent` how far off an estimator is with labels drawn from the model, "
        "whatever labels it was measured with. Variances are those of one (input, label) pair. What "
        "cannot be known is left out; *fimprobe/advice* says why.",
        "## Coverage",
        _table(
            ("measured by", "parameters", "which"),
            [(how, str(len(names)), _some(names)) for how, names in ways.items()],
        ),
        "## Configuration",
        _table(("what", "value"), list(format_run_info(run).items())),
        f"```\n{yaml.safe_dump(run.get('config', {}), sort_keys=False).strip()}\n```",
    ]
    return "\n\n".join(lines)


def advice_page(record: dict[str, Any], most: int = 8) -> str:
    """The advice, and the table of the model and of the layers that need most pairs."""
    advice = "\n".join(f"* {line}" for line in record["advice"])
    rows = make_rows(record, most)
    shown = [
        i for i, head in enumerate(rows[0]) if head not in OPTIONAL_COLUMNS
    ]  # more cells break words
    (head, *rows) = [tuple(row[i] for i in shown) for row in rows]
    told = "\n\n".join(["", *footnotes(record, most, without=OPTIONAL_COLUMNS)])
    left = len(record["layers"]) - most
    more = f"\n\n{left} more layers need fewer pairs." if left > 0 else ""
    return f"## Step {record['step']}\n\n{advice}\n\n{_table(head, rows)}{told}{more}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
