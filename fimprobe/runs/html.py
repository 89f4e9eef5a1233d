"""A run as one self-contained HTML page: no script, no font, no request."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import (
    ESTIMATOR_DESCRIPTIONS,
    KEYS,
    LAYER_KEYS,
    SYMBOLS,
    UNBIASED_KEYS,
)
from fimprobe.report.columns import make_columns
from fimprobe.report.footnotes import explain, footnotes
from fimprobe.report.format import (
    Row,
    one_line,
    percent,
    quantity,
    subsample,
    with_error,
)
from fimprobe.report.partial_reports import describe_earlier, earlier_whole_report, is_partial
from fimprobe.report.record import (
    FROZEN,
    Record,
    describe_hidden,
    describe_inputs,
    describe_labels,
    error_with_drawn_labels,
    format_pairs,
)
from fimprobe.report.run_info import format_run_info
from fimprobe.report.table import make_rows
from fimprobe.report.trends import make_trends, title_of_trends
from fimprobe.runs.page_texts import STYLE, WORDS
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

MAX_SENTENCES = 3
"""Sentences of the advice that are not folded."""


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
    """Return the page: the main numbers and the advice, then tables, figures and the settings."""
    reports = latest_training(records.reports)
    last, earlier = reports[-1], earlier_whole_report(reports)
    folder = records.path.resolve().parent
    name = folder.name if folder.name != "fimprobe" else f"{folder.parent.name}/fimprobe"
    steps = f"step {last['step']:,}"
    if len(reports) > 1:
        steps = (
            f"steps {reports[0]['step']:,} to {reports[-1]['step']:,}, "
            f"{quantity(len(reports), 'report')}"
        )
    body = [
        f"<h1>How wrong is the Fisher information? <span class=soft>{_text(name)}</span></h1>",
        f"<p class=soft>{_text(_subject(records, last))} · {steps} · "
        f"{describe_inputs(last)}, {_text(describe_labels(last))}</p>",
        *[f"<p><b>Careful:</b> {_text(note)}</p>" for note in records.notes],
        *[f"<p><b>The probe ended early:</b> {_text(end)}</p>" for end in (records.end,) if end],
        f"<h2>What step {last['step']:,} says</h2>",
        *_summary(reports),
        *_layer_tables(last, earlier),
        _figures(reports, earlier),
    ]
    if len(reports) > 1:
        body += [
            "<h2>Layers over the training</h2>",
            f"<p class=soft>{_text(title_of_trends(reports))} {_hidden(last, MAX_TRENDS)}</p>",
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


def _summary(reports: list[Record]) -> list[str]:
    """Return the main numbers, and the advice between the first ones and the others."""
    first, others = make_tiles(reports)
    advice = reports[-1]["advice"]
    more = _sentences(advice[MAX_SENTENCES:])
    return [
        _tiles(first),
        _sentences(advice[:MAX_SENTENCES]),
        f"<details><summary>More</summary>{more}{_tiles(others)}</details>",
    ]


def _sentences(advice: list[str]) -> str:
    lines = "".join(f"<li>{_text(line)}</li>\n" for line in advice)
    return f"<ul class=advice>{lines}</ul>" if advice else ""


def _tiles(tiles: list[tuple[str, str]]) -> str:
    inner = "".join(
        f"<div class=tile><b>{_text(shown)}</b><span>{_text(meaning)}</span></div>"
        for shown, meaning in tiles
    )
    return f"<div class=tiles>{inner}</div>" if tiles else ""


def _figures(reports: list[Record], earlier: Record | None) -> str:
    """Return the figures over all reports, and those of the last one.

    Args:
        reports: The records of the run.
        earlier: The record of the report that has what the last one lacks; None where it lacks
            nothing.
    """
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
    figures = {entry.name: entry for entry in make_figures(reports, earlier=earlier)}
    sections = []
    for i, name in enumerate(sorted(figures)):
        entry = figures[name]
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


def _layer_tables(last: Record, earlier: Record | None) -> list[str]:
    """Return the table of the layers, of the hardest ones where there are many, and what unfolds.

    Args:
        last: The record of the last report.
        earlier: The record of the report that has what the last one lacks; None where it lacks
            nothing.
    """
    number_of_layers, title = len(last["layers"]), f"Layers at step {last['step']:,}"
    parts = [f"<h2>{title}</h2>", _layers(last, "errors", MAX_LAYERS)]
    if number_of_layers > MAX_LAYERS:
        parts.append(f"<p class='soft notes'>{_hidden(last, MAX_LAYERS)}</p>")
        parts.append(_fold(f"All {number_of_layers:,} layers", _layers(last, "errors")))
    if earlier is not None:
        parts.append(f"<p>{_text(describe_earlier(earlier))}</p>")
    source = earlier or last
    step = "" if source is last else f", step {source['step']:,}"
    for view, name in _MORE_VIEWS.items():
        if make_columns(source, view):
            parts.append(_fold(f"{name}{step}", _layers(source, view)))
    return parts


def _fold(title: str, inner: str) -> str:
    return f"<details><summary>{title}</summary>{inner}</details>"


def _layers(last: Record, view: str, top: int | None = None) -> str:
    """Return the table of the layers with its footnotes.

    Args:
        last: The record of a report.
        view: The choice of columns.
        top: Number of layers, those that need the most inputs; None for all.
    """
    notes = "<br>".join(map(_text, footnotes(last, top, view=view)))
    rows = make_rows(last, top, view=view)
    return f"{_table(rows, total_last=True)}<p class='soft notes'>{notes}</p>"


def _hidden(last: Record, top: int) -> str:
    """Return in brackets which layers a table does not show."""
    hidden = describe_hidden(last, top)
    return f"({hidden})" if hidden else ""


def _over_steps(reports: list[Record]) -> list[Row]:
    """Return the trace and the errors of every estimator over steps."""
    keys = [key for key in KEYS if any(key in report["total"] for report in reports)]
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
    if is_partial(last.get("notes", [])):
        bounds = "left out of this report because of the time budget"
    run_info = {name: _text(text) for name, text in format_run_info(records.run).items()}
    facts = run_info | {
        "Family of the labels": _text(str(last["likelihood"])),
        "Inputs of each report": f"{last['batch_size']:,}",
        "Labels": _text(describe_labels(last)),
        "Estimators": symbols,
        "Bounds": bounds,
        "Parameters": f"{last['total']['numel']:,} in {quantity(len(last['layers']), 'layer')}",
        "Seconds of this report": f"{last['seconds']:.3g}",
        "Not twice differentiable": _text("; ".join(last.get("kinks", []))) or "–",
        "File": f"<code>{_text(str(records.path.resolve()))}</code>",
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    on_request = {
        SYMBOLS[key]: ESTIMATOR_DESCRIPTIONS[key]
        for key in KEYS
        if key not in LAYER_KEYS and key in last["total"]
    }
    glossary = (WORDS | on_request).items()
    words = "".join(f"<dt>{escape(w)}</dt><dd>{escape(text)}</dd>" for w, text in glossary)
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
