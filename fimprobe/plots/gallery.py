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
from fimprobe.report.record import Record, describe_inputs

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
    sample = f"{describe_inputs(last)}, 1 label from the model each"
    entries = [
        _Entry(
            name="1_error",
            title="Relative error over the training" if len(records) > 1 else "Relative error",
            caption="How far off the diagonal of the whole model's Fisher information is at "
            f"{sample}: the lower the better; from 100 % (dashed) on it is noise. Gaps: unknown. "
            "Logarithmic.",
            draw=lambda: draw_errors(records),
        ),
        _Entry(
            name="2_trace",
            title="Trace of the Fisher information",
            caption="Σᵢ F̂ᵢᵢ of the whole model. Bands: ± 2 standard errors. Hollow points: unknown "
            "errors.",
            draw=lambda: draw_traces(records),
        ),
        _Entry(
            name="3_error_by_layer",
            title=f"Relative error of diag F: {sample}",
            caption=f"The relative error of each layer over the steps at {sample}; layers in the "
            "order of the model. Yellow: noise. Grey: unknown.",
            draw=lambda: draw_error_map(records),
        ),
        _Entry(
            name="4b_labels_by_estimator",
            title="Variance from labels: Î₁ against Î₂",
            caption="What the choice of the label adds to the variance of one (input, label) pair, "
            f"by layer, at step {last['step']:,}, ± 2 standard errors; faint lines lead there from "
            f"the first report. | at the left edge: none at all. Logarithmic.{_cut(last)}",
            draw=lambda: draw_label_variances(records, last),
        ),
        _Entry(
            name="8_error_by_confidence",
            title="Relative error as the model grows confident",
            caption=f"A point for each report: how far off the diagonal is at {sample}. As outputs "
            "grow confident tr I(h) goes to 0, and labels from the model rarely show what carries F. "
            "Logarithmic.",
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
            caption=f"The sources of the variance {at}: the choice of the label and the choice of "
            "the input, summed over the layer's diagonal; | is the bound on the labels' part. "
            f"Logarithmic.{cut}",
            draw=lambda: draw_variances(last),
        ),
        _Entry(
            name="5_pairs_needed",
            title="(input, label) pairs for 10 % error",
            caption=f"Pairs for a relative error of 10 % {at} with labels from the model. No mark: "
            f"unknown. Logarithmic.{cut}",
            draw=lambda: draw_needs(last),
        ),
        _Entry(
            name="6_bound_of_the_matrix",
            title="Labels' covariance of the whole matrix, and its bound",
            caption=f"How loose the bounds are {at}: {_describe_bound(last)}. Logarithmic.{cut}",
            draw=lambda: draw_bounds(last),
        ),
        _Entry(
            name="7_diagonal",
            title="Sizes of the entries of diag F",
            caption=f"The number of entries of each size {at}. Small ones are the hard ones. "
            "Logarithmic.",
            draw=lambda: draw_diagonal(last),
        ),
        _Entry(
            name="9_convergence",
            title="Error of the trace against the number of inputs",
            caption=f"How far off the trace is {at} with fewer or more inputs, measured like this: "
            "for groups of the inputs from their standard deviation, and for all of them. Errors "
            "fall as 1/√inputs where inputs are independent. Dotted: 10 %. Logarithmic.",
            draw=lambda: draw_convergence(last),
        ),
    ]
    return {entry.name: entry for entry in entries}


def _describe_bound(record: Record) -> str:
    if record["draws"] == "exact":
        return "‖Cov‖ and ‖J‖⁴‖M‖ (17) for Î₁, ‖H‖²‖I‖ (18) for Î₂"
    return "the sum of all entries' variances, and s_max(J)⁴ tr M for Î₁, λ_max(I)‖H‖² for Î₂"
