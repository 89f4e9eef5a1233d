"""A run as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.report.format import Row, number, percent, subsample
from fimprobe.report.run_info import format_run_info
from fimprobe.report.table import (
    footnotes,
    inputs_of,
    labels_of,
    make_rows,
    make_trends,
    need_of,
    one_label_error,
    pairs,
    why_unknown,
    without_numbers,
)
from fimprobe.runs.reader import Records, latest_training

KINDS = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H", "empirical": "empirical"}

MOST_STEPS = 30
"""Rows of the table over steps."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2229; --soft: #5c6672; --page: #ffffff; --card: #f4f6f8;
  --line: #d9dee4; --mark: #2f6fbd }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --soft: #98a3af; --page: #14171b;
  --card: #1d2228; --line: #343b44; --mark: #79b0f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 64px; background: var(--page);
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
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
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
    "trace F, ± s.e.": "Σᵢ F̂ᵢᵢ and its standard error over inputs and drawn labels.",
    "rel. error": "√(Σᵢ Var F̂ᵢᵢ) / ‖diag F‖: how far off this report's F is, with its inputs and its "
    "labels. 10 % is good; from 100 % on it is noise.",
    "1 label": "√((V inputs + V labels)/inputs) / ‖diag F‖: how far off an estimator would be with "
    "one label from the model for each of this report's inputs.",
    "size-biased labels": "labels drawn more often where their score is large, and weighted back: F "
    "stays the same, and labels that carry F are seen however rare they are.",
    "V labels, V inputs": "variance of the diagonal from one (input, label) pair, from the choice of "
    "the label and of the input; divided by the number of pairs and of inputs they give the error.",
    "pairs for 10 %": "(input, label) pairs, labels from the model, that a relative error of 10 % "
    "takes; ± how well that is known.",
    "–": "not measured, not defined, or unknown: the reasons stand below the table.",
    "tr I(h), ‖I(h)‖, ‖M‖": "trace and norm of the outputs' Fisher information, and norm of their "
    "fourth moment, means over inputs: tr I(h) goes to 0 as the model grows confident.",
    "bound/Cov": "the bounds (17), (18) of Soen & Sun 2021 over the covariance's norm: 1 is tight.",
}


def write_page(records: Records, target: str | Path) -> Path:
    """Write the page of a run to ``target``.

    Raises :class:`FimprobeError` where that cannot be written.
    """
    path = Path(target)
    try:
        path.write_text(make_page(records), encoding="utf-8")
    except OSError as error:
        raise FimprobeError(f"--html={str(path)!r} cannot be written: {error.strerror}") from None
    return path


def make_page(records: Records) -> str:
    """The page: what it means first, then pictures, tables, and how it was measured."""
    reports = latest_training(records.reports)
    last = reports[-1]
    folder = records.path.resolve().parent
    name = folder.name if folder.name != "fimprobe" else f"{folder.parent.name}/fimprobe"
    steps = f"step {last['step']:,}"
    if len(reports) > 1:
        steps = f"steps {reports[0]['step']:,} to {last['step']:,}, {len(reports)} reports"
    body = [
        f"<h1>How wrong is the Fisher information? <span class=soft>{escape(name)}</span></h1>",
        f"<p class=soft>{escape(_subject(records, last))} · {steps} · "
        f"{inputs_of(last)}, {labels_of(last)}</p>",
        *[f"<p><b>Careful:</b> {escape(note)}</p>" for note in records.notes],
        _tiles(last),
        f"<h2>What step {last['step']:,} says</h2><ul class=advice>",
        *[f"<li>{escape(line)}</li>" for line in last["advice"]],
        "</ul>",
        _pictures(reports),
        f"<h2>Layers at step {last['step']:,}</h2>",
        _table(make_rows(last), total_last=True),
        f"<p class='soft notes'>{'<br>'.join(map(escape, footnotes(last)))}</p>",
    ]
    if len(reports) > 1:
        body += [
            "<h2>Layers over the training</h2>",
            "<p class=soft>First value, bars on a logarithmic scale from the row's least to its "
            "greatest, last value. The 20 layers that need most pairs.</p>",
            _table(make_trends(reports, top=20)),
            "<h2>The whole model over the training</h2>",
            _table(_over_steps(reports)),
        ]
    body.append(_about(records, last))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · fimprobe</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _subject(records: Records, last: dict[str, Any]) -> str:
    """The model, where the record tells it, and the family of its labels."""
    model = f"{records.run['model']}, " if records.run else ""
    return f"{model}{last['likelihood']}"


def _tiles(report: dict[str, Any]) -> str:
    total = report["total"]
    e = total["i1"]
    spread, told = "", "trace of F by Î₁"
    if e["std_error"] is not None:
        spread, told = f" ± {number(e['std_error'])}", f"{told} and its standard error"
    tiles: list[tuple[str, str]] = []
    said: set[str] = set()

    def add(kind: str, field: str, value: float | None, shown: str, told: str) -> None:
        """A tile; the first that lacks its value for a cause tells it."""
        why = "" if value is not None else why_unknown(report, total, kind, field)
        cause = without_numbers(why)
        tiles.append((shown, told if not why or cause in said else f"{told}. Unknown: {why}"))
        said.add(cause)

    add("i1", "trace", e["trace"], number(e["trace"]) + spread, told)
    error, size = e["rel_error"], inputs_of(report)
    told = f"relative error of this report's F: {size}, {labels_of(report)}"
    add("i1", "rel_error", error, percent(error), told)
    for kind, name in KINDS.items():
        if kind in total and kind != "empirical":
            error = one_label_error(total[kind], report["batch_size"])
            each = "1 random vector" if kind == "ih" else "1 label from the model"
            told = f"relative error of {name}: {size}, {each} each"
            add(kind, "one_label_error", error, percent(error), told)
    need = need_of(e)
    add("i1", "pairs_for_10_percent", need, pairs(e), "(input, label) pairs for 10 % by Î₁")
    outputs = report.get("outputs") or {}
    if outputs.get("fisher_trace") is not None:
        tiles.append((number(outputs["fisher_trace"]), "tr I(h) of the outputs: 0 is certainty"))
    inner = "".join(
        f"<div class=tile><b>{escape(v)}</b><span>{escape(t)}</span></div>" for v, t in tiles
    )
    return f"<div class=tiles>{inner}</div>"


def _pictures(reports: list[dict[str, Any]]) -> str:
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
    parts = []
    for i, picture in enumerate(make_figures(reports)):
        svg = to_svg(picture.figure, f"picture{i}")
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.title)}" ', 1)
        parts.append(
            f"<section><h2>{escape(picture.title)}</h2>"
            f"<p class=soft>{escape(picture.caption)}</p><figure>{svg}</figure></section>"
        )
    return "<div class=pictures>" + "\n".join(parts) + "</div>"


def _table(rows: list[Row], *, total_last: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = []
    for row in rows[1:]:
        mark = " class=total" if total_last and row is rows[-1] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>\n"
        + "\n".join(lines)
        + "\n</table></div>"
    )


def _over_steps(reports: list[dict[str, Any]]) -> list[Row]:
    """Every estimator's trace and errors over steps."""
    kinds = [kind for kind in KINDS if kind in reports[-1]["total"]]
    rows: list[Row] = [("step",)]
    for kind in kinds:
        rows[0] += (f"{KINDS[kind]}: trace", "± s.e.", "rel. error")
        rows[0] += () if kind == "empirical" else ("1 label", "pairs for 10 %")
    for report in subsample(reports, MOST_STEPS):
        row: Row = (f"{report['step']:,}",)
        for kind in kinds:
            e = report["total"].get(kind, {})
            row += (number(e.get("trace")), number(e.get("std_error")))
            row += (percent(e.get("rel_error")),)
            if kind != "empirical":
                row += (percent(one_label_error(e, report["batch_size"])), pairs(e))
        rows.append(row)
    return rows


def _about(records: Records, last: dict[str, Any]) -> str:
    """What was measured and how, each parameter's coverage, and the words used."""
    kinds = ", ".join(name for kind, name in KINDS.items() if kind in last["total"])
    bounds = "measured" if last["total"]["i1"].get("bound") is not None else "not measured"
    told = {name: escape(text) for name, text in format_run_info(records.run).items()} | {
        "Family of the labels": escape(str(last["likelihood"])),
        "Inputs of each report": f"{last['batch_size']:,}",
        "Labels": labels_of(last),
        "Estimators": kinds,
        "Bounds": bounds,
        "Parameters": f"{last['total']['numel']:,} in {len(last['layers']):,} layers",
        "Seconds of the last report": f"{last['seconds']:.3g}",
        "Not twice differentiable": escape("; ".join(last.get("kinks", []))) or "–",
        "File": f"<code>{escape(str(records.path.resolve()))}</code>",
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in told.items())
    words = "".join(f"<dt>{escape(w)}</dt><dd>{escape(what)}</dd>" for w, what in WORDS.items())
    coverage = [("parameter", "measured by"), *last.get("coverage", {}).items()]
    left = sum(how.startswith("left") for _, how in coverage)
    of = f"{len(coverage) - 1:,} parameters" + (f", {left} left out" if left else "")
    return (
        f"<h2>How it was measured</h2><dl>{items}</dl>"
        f"<details><summary>How each parameter was measured ({of})</summary>"
        f"{_table(coverage)}</details>"
        f"<h2>Words</h2><dl>{words}</dl>"
    )
