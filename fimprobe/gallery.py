"""Which pictures a run gets, and what each says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fimprobe.pictures import (
    MOST_BARS,
    draw_bounds,
    draw_error_map,
    draw_errors,
    draw_needs,
    draw_traces,
    draw_variances,
    is_exact,
)
from fimprobe.table import drawn_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A figure with what it shows."""

    title: str
    caption: str
    figure: Figure


def make_pictures(reports: Sequence[dict[str, Any]]) -> list[Picture]:
    """All pictures of a run for which it holds the values, over steps and of the last report."""
    last = reports[-1]
    size = drawn_labels(last)
    cut = "" if len(last["layers"]) <= MOST_BARS else f" The {MOST_BARS} layers with most need."
    makers: list[tuple[str, str, Callable[[], Figure | None]]] = [
        (
            "Relative error over the training",
            f"How far off the diagonal of the whole model's Fisher information is at {size}: the "
            "lower the better, near 100 % it is noise.",
            lambda: draw_errors(reports),
        ),
        (
            "Trace of the Fisher information",
            "Σᵢ F̂ᵢᵢ of the whole model. Bands: ± 2 standard errors, over inputs and labels.",
            lambda: draw_traces(reports),
        ),
        (
            "Which layer errs, and when",
            f"Relative error of Î₁ at {size}, layers in the order of the model.",
            lambda: draw_error_map(reports),
        ),
        (
            "Where the variance comes from",
            f"Variance of one (input, label) pair at step {last['step']}, summed over the layer's "
            "diagonal: from the choice of the label, from the choice of the input; | is the bound "
            f"on the labels' part (2024). Logarithmic.{cut}",
            lambda: draw_variances(last),
        ),
        (
            "How loose the bounds are",
            f"Labels' covariance of the layer's whole matrix at step {last['step']}: measured (●) "
            f"and bounded (○: {_bound_of(last)}). Logarithmic.{cut}",
            lambda: draw_bounds(last),
        ),
        (
            "Draws needed",
            f"(input, label) pairs for a relative error of 10 % at step {last['step']}."
            f"{'' if is_exact(last) else ' Dashed: as many as were measured.'}{cut}",
            lambda: draw_needs(last),
        ),
    ]
    found = []
    for title, caption, make in makers:
        figure = make()
        if figure is not None:
            found.append(Picture(title, caption, figure))
    return found


def _bound_of(report: dict[str, Any]) -> str:
    if is_exact(report):
        return "‖J‖⁴‖M‖ (17) for Î₁, ‖H‖²‖I‖ (18) for Î₂, on ‖Cov‖"
    return "s_max(J)⁴ tr M for Î₁, λ_max(I)‖H‖² for Î₂, on the sum of all entries' variances"
