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
    draw_variances,
)
from fimprobe.plots.label_variances import draw_label_variances
from fimprobe.plots.layers import MAX_ROWS
from fimprobe.report.record import Record, describe_inputs, describe_labels

if TYPE_CHECKING:
    from fimprobe.plots.style import Figure


DURING_TRAINING = ("2_trace", "3_error_by_layer")
"""Figures that a training draws meanwhile: the others state the last report, or are charts."""


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
    names: Collection[str] | None = None,
) -> Iterator[CaptionedFigure]:
    """Yield all figures for which there are values.

    Args:
        records: The records of the run, or the condensed ones of a ``PlotHistory``.
        last: The whole record of the last report; None for the last one of ``records``.
        names: Names of the figures to draw; None for all.
    """
    last = last or records[-1]
    over_steps, of_report = _entries_over_steps(records, last), _entries_of_report(last)
    for name in _ORDER:
        if names is not None and name not in names:
            continue
        entry = over_steps.get(name) or of_report[name]
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
    entries = [
        _Entry(
            name="1_error",
            title="Error of F over the training" if len(records) > 1 else "Error of F",
            caption="How far off the diagonal of the whole model's Fisher information is; from 100 % "
            "(dashed) on it is noise. This report: the error of F by Î₁ in each report, with its "
            f"inputs and {describe_labels(last)}. 1 label: the error with {one_label}. Gaps: "
            "unknown. Logarithmic.",
            draw=lambda: draw_errors(records),
        ),
        _Entry(
            name="2_trace",
            title="Trace of the Fisher information",
            caption="The sum of the diagonal of F, of the whole model. Bands: ± 2 standard errors. "
            "Hollow points: their error is unknown.",
            draw=lambda: draw_traces(records),
        ),
        _Entry(
            name="3_error_by_layer",
            title=f"Error with {one_label}",
            caption=f"The error of each layer over the steps with {one_label}; layers in the order "
            "of the model. Yellow: noise. Grey: unknown.",
            draw=lambda: draw_error_map(records),
        ),
        _Entry(
            name="4b_labels_by_estimator",
            title="Label variance: Î₁ against Î₂",
            caption="How much the diagonal from one (input, label) pair varies with its label, by "
            f"layer, at step {last['step']:,}, ± 2 standard errors; faint lines lead there from the "
            f"first report. | at the left edge: not at all. Logarithmic.{_cut(last)}",
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


def _cut(last: Record) -> str:
    """Which layers are shown, if not all of them."""
    if len(last["layers"]) <= MAX_ROWS:
        return ""
    return f" The {MAX_ROWS} layers that need the most pairs."


def _entries_of_report(last: Record) -> dict[str, _Entry]:
    """Return the figures of the last report by name."""
    at = f"at step {last['step']:,}"
    cut = _cut(last)
    entries = [
        _Entry(
            name="4_variance_and_bound",
            title="Variance of one (input, label) pair",
            caption=f"How much the diagonal from one pair varies with its label and with its input "
            f"{at}, summed over the layer; | is the bound on label variance. Logarithmic.{cut}",
            draw=lambda: draw_variances(last),
        ),
        _Entry(
            name="5_pairs_needed",
            title="(input, label) pairs for an error of 10 %",
            caption="A pair is one input with one label from the model: how many of them an error of "
            f"10 % takes, {at}. No mark: unknown. Logarithmic.{cut}",
            draw=lambda: draw_needs(last),
        ),
        _Entry(
            name="6_bound_of_the_matrix",
            title="How much the whole matrix varies with labels, and its bound",
            caption=f"How loose the bounds are {at}: {_describe_bound(last)}. Logarithmic.{cut}",
            draw=lambda: draw_bounds(last),
        ),
        _Entry(
            name="7_diagonal",
            title="Sizes of the entries of the diagonal of F",
            caption=f"How many entries have each size {at}, by Î₁. Small entries have large relative "
            "errors. Logarithmic.",
            draw=lambda: draw_diagonal(last),
        ),
        _Entry(
            name="9_convergence",
            title="Error of the trace against the number of inputs",
            caption=f"How far off the trace of F is {at} with fewer or more inputs: measured with "
            "groups of this report's inputs, and with all of them. Errors fall as 1/√inputs (dashed) "
            "where inputs are independent. Dotted: 10 %. Logarithmic.",
            draw=lambda: draw_convergence(last),
        ),
    ]
    return {entry.name: entry for entry in entries}


def _describe_bound(record: Record) -> str:
    if record["draws"] == "exact":
        bounds = "the bounds of Soen & Sun (2021), eq. 17 for Î₁ and eq. 18 for Î₂"
        return f"the norm of the covariance over labels, and {bounds}"
    return "the label variance of all entries, not only of the diagonal, and a bound on it"
