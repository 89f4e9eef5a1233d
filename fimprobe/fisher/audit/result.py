"""The result of an audit: numbers of every layer, and a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field

from fimprobe.fisher.audit.comparison import GroupAudit
from fimprobe.fisher.audit.fits import CandidateFit
from fimprobe.fisher.fisher import Fisher, name_layers_of
from fimprobe.report.format import Row, align, number, percent, quantity, with_error

SHOWN_LAYERS = 12
"""Number of layers in a table; those with the largest traces of F."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A diagonal compared with the Fisher information.

    Attributes:
        total: The comparison over all compared parameters.
        layers: The same for every layer.
        diagnosis: What the diagonal is, in a sentence; None unless exactly one candidate fits.
        finding: The diagnosis, or what stands in its way, in sentences.
        candidates: The candidates that were tried, those that fit first, then the nearest.
        reference: The estimate of F that it was compared with.
        top: Share of the entries that count as the largest.
        notes: What a reader of the numbers must know.
    """

    total: GroupAudit
    layers: dict[str, GroupAudit] = field(repr=False)
    diagnosis: str | None
    finding: str = field(repr=False)
    candidates: list[CandidateFit] = field(repr=False)
    reference: Fisher = field(repr=False)
    top: float
    notes: list[str] = field(repr=False)

    def __str__(self) -> str:
        """A table of the layers with the largest traces, and the summary."""
        ranked = sorted(self.layers, key=lambda name: -self.reference.layers[name].trace)
        shown = set(ranked[:SHOWN_LAYERS])
        labels = name_layers_of(self.reference)
        share = f"top {100 * self.top:.3g} %"
        names = ("cosine", "error", share)
        heads = [head for name in names for head in (name, f"{name} if F")]
        rows: list[Row] = [
            ("layer", "trace ratio", *heads),
            *(_row(labels[name], group) for name, group in self.layers.items() if name in shown),
            _row("total", self.total),
        ]
        hidden = len(ranked) - len(shown)
        more = [f"and {quantity(hidden, 'layer')} with smaller traces"] if hidden else []
        meanings = [
            "trace ratio: the trace of `theirs` over that of F ± standard error; 1 at equal scale",
            "cosine, error: between `theirs` and F, and how far off it is after the best rescaling",
            f"{share}: how many of the largest {share.removeprefix('top ')} of F's entries are among "
            "those of `theirs`",
            "if F: what F itself would show in place of `theirs`, as F is estimated with an error",
        ]
        return "\n".join([*align(rows), *more, *meanings, "", self.summary()])

    def summary(self) -> str:
        """Return how far the diagonal is off and what it is, in sentences."""
        total = self.total
        if total.error is None:
            off = "The error is not known, because one of the two diagonals is zero."
        else:
            off = (
                f"Multiplied by {number(total.factor)}, which brings it nearest to F, `theirs` is "
                f"off by {percent(total.error)}. The error of the estimated F alone would be "
                f"{percent(total.noise_error)}; without it {percent(total.excess_error)} are left."
            )
        state = self.reference.summary().splitlines()[0].removeprefix("F ")
        reference = f"The F that it is compared with {state}"
        return "\n".join([self.finding, off, reference, *self.notes])


def _row(name: str, group: GroupAudit) -> Row:
    return (
        name,
        with_error(group.scale, group.scale_error),
        number(group.cosine),
        number(group.noise_cosine),
        percent(group.error),
        percent(group.noise_error),
        percent(group.overlap),
        percent(group.noise_overlap),
    )
