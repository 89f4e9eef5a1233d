"""The list of the figures of a run with their captions; each is drawn on request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fimprobe.plots.figures import (
    draw_bounds,
    draw_convergence,
    draw_diagonal,
    draw_error_map,
    draw_errors,
    draw_errors_by_confidence,
    draw_needs,
    draw_traces,
)
from fimprobe.plots.layers import MAX_ROWS
from fimprobe.plots.variances import draw_label_variances, draw_variances
from fimprobe.report.format import percent
from fimprobe.report.record import Record, describe_hidden, describe_inputs, describe_labels

if TYPE_CHECKING:
    from fimprobe.plots.style import Figure


DURING_TRAINING = ("2_trace", "3_error_by_layer")
"""Figures that a training draws meanwhile: the others state the last report, or are charts."""


OF_WHOLE_REPORTS = ("4b_labels_by_estimator", "6_bound_of_the_matrix")
"""Figures whose values a preview does not have."""


@dataclass(frozen=True, kw_only=True)
class CaptionedFigure:
    """A figure with its title and caption."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A figure before it is drawn; ``draw`` returns None where there are no values for it."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure | None]


def make_figures(
    records: Sequence[Record],
    last: Record | None = None,
    *,
    earlier: Record | None = None,
    names: Collection[str] | None = None,
) -> Iterator[CaptionedFigure]:
    """Yield all figures for which there are values.

    Args:
        records: The records of the run, or the condensed ones of a ``PlotHistory``.
        last: The whole record of the last report; None for the last one of ``records``.
        earlier: The record of the last report that has what the last one lacks as a preview; None
            where it lacks nothing.
        names: Names of the figures to draw; None for all.
    """
    last = last or records[-1]
    entries = _entries_over_steps(records, last) | _entries_of_report(last)
    if earlier is not None:
        before = [record for record in records if record["step"] <= earlier["step"]]
        whole = _entries_over_steps(before, earlier) | _entries_of_report(earlier)
        entries |= {name: whole[name] for name in OF_WHOLE_REPORTS}
    for name in _ORDER:
        if names is not None and name not in names:
            continue
        entry = entries[name]
        figure = entry.draw()
        if figure is not None:
            yield CaptionedFigure(name=name, title=entry.title, caption=entry.caption, figure=figure)


_ORDER = (
    "1_error",
    "2_trace",
    "3_error_by_layer",
    "4_variance_and_bound",
    "4b_labels_by_estimator",
    "5_pairs_needed",
    "6_bound_of_the_matrix",
    "7_diagonal",
    "8_error_by_confidence",
    "9_convergence",
)
"""The figures as readers need them; TensorBoard sorts its tags by their numbers."""


def _entries_over_steps(records: Sequence[Record], last: Record) -> dict[str, _Entry]:
    """Return the figures over all reports by name."""
    one_label = f"1 label from the model for each of {describe_inputs(last)}"
    since = "; faint lines lead there from the first report"
    entries = [
        _Entry(
            name="1_error",
            title="Error of F over the training" if len(records) > 1 else f"Error of F, {_at(last)}",
            caption="How far off the diagonal of the whole model's Fisher information is; from 100 % "
            "(dotted) on it is noise. Thick: the error of F in each report, with its inputs and "
            f"{describe_labels(last)}. Dashed: the error with {one_label}. Grey circles at the top: "
            "unknown. Logarithmic.",
            draw=lambda: draw_errors(records),
        ),
        _Entry(
            name="2_trace",
            title="Trace of the Fisher information",
            caption="The sum of the diagonal of F, of the whole model. Bars: ± 2 standard errors. "
            "Hollow points: their error is unknown.",
            draw=lambda: draw_traces(records),
        ),
        _Entry(
            name="3_error_by_layer",
            title=f"Error with {one_label}",
            caption=f"The error of each layer over the steps with {one_label}; layers in the order "
            "of the model. Dark: small errors, light: large ones, as the bar shows; from 100 % on it "
            "is noise. Grey: unknown.",
            draw=lambda: draw_error_map(records),
        ),
        _Entry(
            name="4b_labels_by_estimator",
            title=f"Label variance: Î₁ against Î₂, {_at(last)}",
            caption="How much the diagonal from one (input, label) pair varies with its label, by "
            f"layer, ± 2 standard errors{since if records[0]['step'] != last['step'] else ''}. An "
            "arrow: the bar goes on to the left. Marks at the left edge: none (empty), unknown (×). "
            f"Logarithmic.{_cut(last)}",
            draw=lambda: draw_label_variances(records, last),
        ),
        _Entry(
            name="8_error_by_confidence",
            title="Error with 1 label as the model grows confident",
            caption=f"A point for each report: how far off the diagonal is with {one_label}. As the "
            "model grows confident, the trace of the output Fisher goes to 0, and labels from the "
            "model rarely show what carries F. Logarithmic.",
            draw=lambda: draw_errors_by_confidence(records),
        ),
    ]
    return {entry.name: entry for entry in entries}


def _at(record: Record) -> str:
    """Return the step of a report."""
    return f"step {record['step']:,}"


def _cut(last: Record) -> str:
    """Which layers are shown, if not all of them."""
    hidden = describe_hidden(last, MAX_ROWS)
    return f" {hidden[0].upper()}{hidden[1:]}." if hidden else ""


def _entries_of_report(last: Record) -> dict[str, _Entry]:
    """Return the figures of the last report by name."""
    at, cut = _at(last), _cut(last)
    matrix = _name_matrix_variance(last)
    entries = [
        _Entry(
            name="4_variance_and_bound",
            title=f"Variance of one (input, label) pair, {at}",
            caption="How much the diagonal from one pair varies with its label and with its input, "
            "summed over the layer; | is the bound on label variance. Marks at the left edge: none "
            f"(empty), unknown (×). Logarithmic.{cut}",
            draw=lambda: draw_variances(last),
        ),
        _Entry(
            name="5_pairs_needed",
            title=f"(input, label) pairs for an error of 10 %, {at}",
            caption="A pair is one input with one label from the model: how many of them an error of "
            f"10 % takes. No mark: unknown. Logarithmic.{cut}",
            draw=lambda: draw_needs(last),
        ),
        _Entry(
            name="6_bound_of_the_matrix",
            title=f"{matrix}, and its bound, {at}",
            caption=f"How much the whole matrix varies with labels, and how loose its bounds are"
            f"{_name_bounds(last)}. Logarithmic.{cut}",
            draw=lambda: draw_bounds(last),
        ),
        _Entry(
            name="7_diagonal",
            title=f"Sizes of the entries of the diagonal of F, {at}",
            caption="How many entries have each size, by Î₁. Small entries have large relative "
            "errors. Logarithmic.",
            draw=lambda: draw_diagonal(last),
        ),
        _Entry(
            name="9_convergence",
            title=f"Error of the trace alone, {at}",
            caption="How far off the trace of F, a sum, is with fewer or more inputs: measured with "
            f"groups of the inputs, and with all {last['batch_size']:,} of them (this report). "
            f"{_compare_errors(last)} Errors fall as 1/√inputs (dashed) where inputs are "
            "independent. Dotted: 10 %. Logarithmic.",
            draw=lambda: draw_convergence(last),
        ),
    ]
    return {entry.name: entry for entry in entries}


def _name_matrix_variance(record: Record) -> str:
    exact = record["draws"] == "exact"
    return "Norm of the covariance over labels" if exact else "Label variance of all entries"


def _name_bounds(record: Record) -> str:
    exact = record["draws"] == "exact"
    return ": those of Soen & Sun (2021), eq. 17 for Î₁ and eq. 18 for Î₂" if exact else ""


def _compare_errors(record: Record) -> str:
    """State the error of F, which readers take that of the trace for."""
    estimate = record["total"]["i1"]
    error, of_trace = estimate.get("rel_error"), estimate.get("std_error")
    if error is None:
        return "The error of F, of all entries, is unknown."
    larger = "larger: " if of_trace and error > of_trace / estimate["trace"] else ""
    return f"The error of F, of all entries, is {larger}{percent(error)}."
