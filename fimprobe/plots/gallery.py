"""Which pictures a run gets, and what each says; drawn when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fimprobe.plots.figures import (
    MOST_ROWS,
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
from fimprobe.plots.history import Record
from fimprobe.report.table import inputs_of

if TYPE_CHECKING:
    from fimprobe.plots.style import Figure

OVER_STEPS = ("errors", "traces")
"""Pictures that TensorBoard draws itself, as charts."""


class CaptionedFigure(NamedTuple):
    """A figure with what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def make_figures(
    records: Sequence[Record], last: Record | None = None, *, without: Sequence[str] = ()
) -> Iterator[CaptionedFigure]:
    """All pictures for which there are values: over ``records``, and of the ``last`` of them.

    ``records`` may be the ``compact``\\ d ones, where ``last`` is whole.
    """
    last = last or records[-1]
    at = f"at step {last['step']:,}"
    size = f"{inputs_of(last)}, 1 label from the model each"
    cut = "" if len(last["layers"]) <= MOST_ROWS else f" The {MOST_ROWS} layers with most need."
    makers: list[tuple[str, str, str, Callable[[], Figure | None]]] = [
        (
            "errors",
            "Relative error over the training",
            f"How far off the diagonal of the whole model's Fisher information is at {size}: the "
            "lower the better; from 100 % (dashed) on it is noise. Gaps: not known. Logarithmic.",
            lambda: draw_errors(records),
        ),
        (
            "traces",
            "Trace of the Fisher information",
            "Σᵢ F̂ᵢᵢ of the whole model. Bands: ± 2 standard errors. Hollow points: their errors are "
            "not known.",
            lambda: draw_traces(records),
        ),
        (
            "1_relative_error",
            f"Relative error of diag F: {size}",
            f"Which layer errs, and when: at {size}, layers in the order of the model. Yellow: "
            "noise. Grey: not known.",
            lambda: draw_error_map(records),
        ),
        (
            "2_variance_and_bound",
            "Variance of one (input, label) pair",
            f"Where the variance comes from {at}: from the choice of the label, from the choice of "
            "the input, summed over the layer's diagonal; | is the bound on the labels' part. "
            f"Logarithmic.{cut}",
            lambda: draw_variances(last),
        ),
        (
            "3_pairs_needed",
            "(input, label) pairs for 10 % error",
            f"Pairs that a relative error of 10 % takes {at} with labels from the model. No mark: "
            f"not known. Logarithmic.{cut}",
            lambda: draw_needs(last),
        ),
        (
            "4_bound_of_the_matrix",
            "Labels' covariance of the whole matrix, and its bound",
            f"How loose the bounds are {at}: {_bound_of(last)}. Logarithmic.{cut}",
            lambda: draw_bounds(last),
        ),
        (
            "5_diagonal",
            "Sizes of the entries of diag F",
            f"How many entries are how large {at}. Small ones are the hard ones. Logarithmic.",
            lambda: draw_diagonal(last),
        ),
        (
            "6_error_by_confidence",
            "Relative error as the model grows confident",
            f"A point for each report: how far off the diagonal is at {size}. As outputs grow "
            "confident tr I(h) goes to 0, and labels from the model show what carries F ever more "
            "rarely. Logarithmic.",
            lambda: draw_errors_by_confidence(records),
        ),
        (
            "7_convergence",
            "Error of the trace against the number of inputs",
            f"How far off the trace is {at} with fewer or more inputs, measured like this: of groups "
            "of the inputs, by their spread, and of all of them. Errors fall as 1/√inputs where "
            "inputs are independent. Dotted: 10 %. Logarithmic.",
            lambda: draw_convergence(last),
        ),
    ]
    for name, title, caption, make in makers:
        figure = None if name in without else make()
        if figure is not None:
            yield CaptionedFigure(name, title, caption, figure)


def _bound_of(record: Record) -> str:
    if record["draws"] == "exact":
        return "‖Cov‖ and ‖J‖⁴‖M‖ (17) for Î₁, ‖H‖²‖I‖ (18) for Î₂"
    return "the sum of all entries' variances, and s_max(J)⁴ tr M for Î₁, λ_max(I)‖H‖² for Î₂"
