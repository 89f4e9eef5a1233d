"""A run as one self-contained HTML page: no script, no font, no request."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import KEYS, SYMBOLS, UNBIASED_KEYS
from fimprobe.report.footnotes import explain, footnotes
from fimprobe.report.format import (
    Row,
    one_line,
    percent,
    quantity,
    subsample,
    with_error,
)
from fimprobe.report.record import (
    FROZEN,
    Record,
    describe_inputs,
    describe_labels,
    error_with_drawn_labels,
    format_pairs,
)
from fimprobe.report.run_info import format_run_info
from fimprobe.report.table import make_rows
from fimprobe.report.trends import make_trends, title_of_trends
from fimprobe.runs.reader import Records, latest_training
from fimprobe.runs.tiles import make_tiles

_MORE_VIEWS = {
    "variances": "Errors with 1 label, pairs for an error of 10 %, and variances",
    "bounds": "Bounds over the values that they bound",
}
"""The views of the table that a reader unfolds, with their titles."""

MAX_LAYERS = 30
"""Layers in the table that is not folded: the pictures stand below it."""

MAX_TRENDS = 20
"""Layers in the table over the training."""

MAX_STEPS = 30
"""Rows of the table over steps; longer runs are subsampled evenly."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2229; --soft: #5c6672; --page: #ffffff; --card: #f4f6f8;
  --line: #d9dee4; --mark: #2f6fbd }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #98a3af; --page: #14171b;
  --card: #1d2228; --line: #343b44; --mark: #79b0f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1320px; padding: 24px 20px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 40px 0 4px }
p { margin: 4px 0 12px; max-width: 75ch } .soft { color: var(--soft) }
p.notes { max-width: none; font-size: 13px }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.tile { background: var(--card); border-radius: 8px; padding: 12px 16px; flex: 1 1 190px }
.tile b { display: block; font-size: 24px; line-height: 1.3 } .tile span { color: var(--soft) }
.advice { background: var(--card); border-left: 4px solid var(--mark); border-radius: 4px;
  padding: 12px 16px 12px 34px; margin: 0 } .advice li { margin: 4px 0 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  gap: 0 32px }
.scroll { overflow-x: auto } figure { margin: 8px 0; overflow-x: auto }
svg { max-width: 100%; height: auto; display: block; color: var(--ink) }
svg text { font-family: system-ui, sans-serif !important }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap } th { vertical-align: bottom; white-space: normal; min-width: 70px }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr.total td { font-weight: 600; border-top: 2px solid var(--line) }
dt { font-weight: 600; margin-top: 6px } dd { margin: 0 0 0 0 } summary { cursor: pointer }
"""

WORDS = {
    "F": "the Fisher information of the model's parameters: the mean over inputs of the covariance "
    "of ∂ log p(y | x)/∂θ, labels y drawn from the model itself. Its diagonal is measured.",
    "Î₁, Î₂": "two unbiased estimates of F: the mean square of first derivatives, and minus the mean "
    "second derivative. They differ in variance.",
    "trace F": "the sum of the diagonal of F ± its standard error over inputs and drawn labels.",
    "error": "the error of this report: how far off its F is, with its inputs and its labels. It is "
    "the standard error of the diagonal of F over the size of that diagonal (root of the sum of "
    "squares of both). 10 % is good; from 100 % on it is noise.",
    "1 label": "the error with 1 label: how far off an estimator would be with one label, drawn from "
    "the model, for each input. It holds however the labels of this report were drawn.",
    "size-biased labels": "labels drawn more often where their score is large, and weighted back: F "
    "stays the same, and labels that carry F are seen however rare they are.",
    "pair": "one input with one label, drawn from the model. 100 inputs with 2 labels each are 200 "
    "pairs, but their errors from the choice of inputs are those of 100 inputs.",
    "pairs for 10 %": "how many pairs, one label for each input, an error of 10 % takes, ± the "
    "standard error of that number.",
    "label variance, input variance": "how much the diagonal of F from one pair varies with its "
    "label, and with its input.",
    "verdict": "trusted where the error of Î₁ is at most 10 %, or how many inputs that takes, with "
    "labels as in this report.",
    "–": "not measured, not defined, or unknown, for the reasons below the table.",
    "output Fisher": "the Fisher information of the model's outputs, a mean over inputs. For labels "
    "that are classes, its trace goes to 0 as the model grows confident.",
    "bound/...": "a bound over the value that it bounds; 1 is equality. diagonal: the label variance "
    "of the diagonal of F; matrix: that of all entries; covariance: the norm of the covariance, "
    "bounded by Soen & Sun (2021), eq. 17 for Î₁ and eq. 18 for Î₂.",
}


def write_page(records: Records, target: str | Path) -> Path:
    """Write the page of a run.

    Args:
        records: The run, as :func:`fimprobe.read` returns it.
        target: The path of the page.

    Returns:
        The path.

    Raises:
        FimprobeError: If the file cannot be written.
    """
    path = Path(target)
    try:
        path.write_text(make_page(records), encoding="utf-8")
    except OSError as error:
        raise FimprobeError(
            f"`--html` must be a path that can be written, got {str(path)!r} ({error.strerror})."
        ) from None
    return path


def make_page(records: Records) -> str:
    """Return the page: advice first, then figures, tables and the settings of the measurement."""
    reports = latest_training(records.reports)
    last = reports[-1]
    folder = records.path.resolve().parent
    name = folder.name if folder.name != "fimprobe" else f"{folder.parent.name}/fimprobe"
    steps = f"step {last['step']:,}"
    if len(reports) > 1:
        steps = (
            f"steps {reports[0]['step']:,} to {last['step']:,}, {quantity(len(reports), 'report')}"
        )
    body = [
        f"<h1>How wrong is the Fisher information? <span class=soft>{_text(name)}</span></h1>",
        f"<p class=soft>{_text(_subject(records, last))} · {steps} · "
        f"{describe_inputs(last)}, {_text(describe_labels(last))}</p>",
        *[f"<p><b>Careful:</b> {_text(note)}</p>" for note in records.notes],
        *[f"<p><b>The probe ended early:</b> {_text(end)}</p>" for end in (records.end,) if end],
        f"<h2>What step {last['step']:,} says</h2><ul class=advice>",
        *[f"<li>{_text(line)}</li>" for line in last["advice"]],
        "</ul>",
        _tiles(reports),
        *_layer_tables(last),
        _figures(reports),
    ]
    if len(reports) > 1:
        body += [
            "<h2>Layers over the training</h2>",
            f"<p class=soft>{_text(title_of_trends(reports))}{_which(last, MAX_TRENDS)}</p>",
            _table(make_trends(reports, top=MAX_TRENDS)),
            "<h2>The whole model over the training</h2>",
            _table(_over_steps(reports)),
            f"<p class='soft notes'>{'<br>'.join(map(_text, explain(last, ('1 label',))))}</p>",
        ]
    body.append(_about(records, last))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)} · fimprobe</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _text(text: str) -> str:
    """Return one line of text whose markup HTML shows as it is."""
    return escape(one_line(text))


def _subject(records: Records, last: Record) -> str:
    """Return the model, where the record has it, and the likelihood."""
    model = f"{records.run['model']}, " if records.run else ""
    return f"{model}{last['likelihood']}"


def _tiles(reports: list[Record]) -> str:
    inner = "".join(
        f"<div class=tile><b>{_text(shown)}</b><span>{_text(meaning)}</span></div>"
        for shown, meaning in make_tiles(reports)
    )
    return f"<div class=tiles>{inner}</div>"


def _figures(reports: list[Record]) -> str:
    try:
        from fimprobe.plots.gallery import make_figures
        from fimprobe.plots.style import to_svg
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        return (
            "<p class=soft>No pictures: matplotlib is not installed. "
            "<code>pip install 'fimprobe[plots]'</code>, then write this page again.</p>"
        )
    sections = []
    for i, entry in enumerate(make_figures(reports)):
        svg = to_svg(entry.figure, f"picture{i}")
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(entry.title)}" ', 1)
        sections.append(
            f"<section><h2>{escape(entry.title)}</h2>"
            f"<p class=soft>{escape(entry.caption)}</p><figure>{svg}</figure></section>"
        )
    return "<div class=pictures>" + "\n".join(sections) + "</div>"


def _table(rows: list[Row], *, total_last: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = []
    for row in rows[1:]:
        mark = " class=total" if total_last and row is rows[-1] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>\n"
        + "\n".join(lines)
        + "\n</table></div>"
    )


def _layer_tables(last: Record) -> list[str]:
    """Return the table of the layers, of the hardest ones where there are many, and what unfolds."""
    number_of_layers = len(last["layers"])
    views, title, top = dict(_MORE_VIEWS), f"Layers at step {last['step']:,}", None
    if number_of_layers > MAX_LAYERS:
        top, title = MAX_LAYERS, f"{title}: the {MAX_LAYERS} that need the most pairs"
        views = {"errors": f"All {number_of_layers:,} layers", **views}
    more = [
        f"<details><summary>{name}</summary>{_layers(last, view)}</details>"
        for view, name in views.items()
    ]
    return [f"<h2>{title}</h2>", _layers(last, "errors", top), *more]


def _layers(last: Record, view: str, top: int | None = None) -> str:
    """Return the table of the layers with its footnotes.

    Args:
        last: The record of the last report.
        view: The choice of columns.
        top: Number of layers, those that need the most pairs; None for all.
    """
    notes = "<br>".join(map(_text, footnotes(last, top, view=view)))
    rows = make_rows(last, top, view=view)
    return f"{_table(rows, total_last=True)}<p class='soft notes'>{notes}</p>"


def _which(last: Record, top: int) -> str:
    """Return which layers a table shows, if not all of them."""
    return "" if len(last["layers"]) <= top else f" The {top} layers that need the most pairs."


def _over_steps(reports: list[Record]) -> list[Row]:
    """Return the trace and the errors of every estimator over steps."""
    keys = [key for key in KEYS if key in reports[-1]["total"]]
    rows: list[Row] = [("step",)]
    for key in keys:
        values = (
            "trace F",
            "error",
            *(("1 label", "pairs for 10 %") if key in UNBIASED_KEYS else ()),
        )
        rows[0] += tuple(f"{value}: {SYMBOLS[key]}" for value in values)
    for report in subsample(reports, MAX_STEPS):
        row: Row = (f"{report['step']:,}",)
        for key in keys:
            estimate = report["total"].get(key, {})
            row += (with_error(estimate.get("trace"), estimate.get("std_error")),)
            row += (percent(estimate.get("rel_error")),)
            if key in UNBIASED_KEYS:
                error = error_with_drawn_labels(
                    estimate, report["batch_size"], at=reports[-1]["batch_size"]
                )
                row += (percent(error), format_pairs(estimate))
        rows.append(row)
    return rows


def _about(records: Records, last: Record) -> str:
    """Return the settings of the measurement, the coverage of the parameters, and the glossary."""
    symbols = ", ".join(SYMBOLS[key] for key in KEYS if key in last["total"])
    bounds = "measured" if last["total"]["i1"].get("bound") is not None else "not measured"
    run_info = {name: _text(text) for name, text in format_run_info(records.run).items()}
    facts = run_info | {
        "Family of the labels": _text(str(last["likelihood"])),
        "Inputs of each report": f"{last['batch_size']:,}",
        "Labels": _text(describe_labels(last)),
        "Estimators": symbols,
        "Bounds": bounds,
        "Parameters": f"{last['total']['numel']:,} in {quantity(len(last['layers']), 'layer')}",
        "Seconds of the last report": f"{last['seconds']:.3g}",
        "Not twice differentiable": _text("; ".join(last.get("kinks", []))) or "–",
        "File": f"<code>{_text(str(records.path.resolve()))}</code>",
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    words = "".join(f"<dt>{escape(w)}</dt><dd>{escape(text)}</dd>" for w, text in WORDS.items())
    every = last.get("coverage", {})
    shown = {name: how for name, how in every.items() if how != FROZEN}
    coverage: list[Row] = [("parameter", "measured by"), *shown.items()]
    left_out = sum(how.startswith("left") for how in shown.values())
    parameters = quantity(len(shown), "parameter tensor")
    parameters += f", {left_out:,} left out" if left_out else ""
    frozen = len(every) - len(shown)
    parameters += f"; {quantity(frozen, 'frozen one')} not listed" if frozen else ""
    return (
        f"<h2>How it was measured</h2><dl>{items}</dl>"
        f"<details><summary>How each parameter was measured ({parameters})</summary>"
        f"{_table(coverage)}</details>"
        f"<h2>Words</h2><dl>{words}</dl>"
    )
