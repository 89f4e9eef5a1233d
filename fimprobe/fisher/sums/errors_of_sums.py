"""The diagonal of F and its errors, from sums over inputs.

Two targets have two errors. The mean over the data set (finite, N inputs): inputs that were seen
contribute the error of their labels only. The mean over the distribution that the inputs are a
sample of: inputs contribute too. See docs/theory.md, "The mean over a finite data set".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.fisher.sums.accumulation import EntrySums, FisherSums

DRIFT_ERRORS = 5
"""Standard errors by which the variance between batches may exceed the one that inputs explain."""

MIN_DRIFT_BATCHES = 4
"""Number of batches from which such an excess is looked for."""


@dataclass(kw_only=True)
class SampleDesign:
    """How the inputs of the sums were chosen.

    Attributes:
        size: N, the number of inputs of the data set; None while it is not known.
        replaced: Whether inputs were drawn with replacement, in proportion to τ.
        ordered: Whether the batches are those of the data, which may be alike inside.
        stream: Whether they were read in the order of the data, which may not be random.
    """

    size: int | None
    replaced: bool = False
    ordered: bool = False
    stream: bool = False

    def fraction(self, inputs: int) -> float:
        """Return the share of the data set that was seen; 0 where it does not reduce the error."""
        return 0.0 if self.replaced or not self.size else min(1.0, inputs / self.size)

    def is_no_sample(self, sums: FisherSums) -> bool:
        """Return whether the inputs are the beginning of sorted data, whose error is not known."""
        if not self.stream or self.fraction(sums.inputs) == 1:
            return False
        return sums.sorted_labels or drift(sums)[0]


@dataclass(kw_only=True)
class GroupErrors:
    """The numbers of every group of parameters [G], float64; NaN where they are not known.

    Attributes:
        trace: Σ_i F̂_ii.
        trace_error: Its standard error, widened so that ± 2 of it cover 95 %.
        norm: ‖diag F‖₂, corrected for noise.
        error: √(Σ_i Var F̂_ii).
        rel_error: ``error`` / ``norm``.
        rel_error_spread: Relative standard error of ``rel_error``.
        population_rel_error: ``rel_error`` as an estimate for the distribution of the inputs.
        effective: Effective number of inputs (Σt)²/Σt².
        widening: Factor by which standard errors are widened.
    """

    trace: Tensor
    trace_error: Tensor
    norm: Tensor
    error: Tensor
    rel_error: Tensor
    rel_error_spread: Tensor
    population_rel_error: Tensor
    effective: Tensor
    widening: Tensor


def group_errors(sums: FisherSums, design: SampleDesign) -> GroupErrors:
    """Return the errors of every group.

    Args:
        sums: Sums over the inputs of all processes.
        design: How the inputs were chosen.
    """
    n, column = max(sums.inputs, 1), sums.column
    squares = {name: float(e.total.square().sum()) for name, e in sums.entries.items()}
    total_square = torch.tensor(
        [math.fsum(squares[name] for name in names) for names in sums.groups.values()],
        dtype=torch.float64,
    )
    between = _sample_variance(column("square"), total_square, n)
    trace_between = _sample_variance(column("trace_square"), column("trace").square(), n)
    inflation = drift(sums)[1] if design.ordered else 1.0
    variance, trace_variance = (
        _mean_variance(x, label / n, sums, design) * (inflation if design.fraction(n) < 1 else 1.0)
        for x, label in ((between, column("label")), (trace_between, column("trace_label")))
    )
    biased = total_square / n**2
    norm_square = biased - variance
    in_population = between / n
    widening = _widening(trace_between, trace_variance, sums, design)
    if design.is_no_sample(sums):
        variance, trace_variance, in_population = (
            torch.full_like(x, math.nan) for x in (variance, trace_variance, in_population)
        )
    return GroupErrors(
        trace=column("trace") / n,
        trace_error=trace_variance.sqrt() * widening,
        norm=norm_square.clamp(min=0).sqrt(),
        error=variance.sqrt(),
        rel_error=_ratio(variance, norm_square),
        rel_error_spread=_combined_spread(
            _spread(sums, biased - in_population), between, sums, design
        ),
        population_rel_error=_ratio(in_population, biased - in_population),
        effective=_effective(column("trace"), column("trace_square")),
        widening=widening,
    )


def entry_estimates(
    sums: FisherSums, design: SampleDesign
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the diagonal of F, and the standard error of each entry, in the parameters' shapes.

    Args:
        sums: Sums over the inputs of all processes.
        design: How the inputs were chosen. Errors are infinite where none is known.
    """
    n = max(sums.inputs, 1)
    unseen = 1 - design.fraction(n)
    inflation = drift(sums)[1] if design.ordered and unseen > 0 else 1.0
    diagonal = {name: e.total / n for name, e in sums.entries.items()}
    rows = {group: row for row, group in enumerate(sums.groups)}
    errors = {}
    for name, entry in sums.entries.items():
        row = rows[f"parameter {name}"]
        trace, square = float(sums.column("trace")[row]), float(sums.column("square")[row])
        # an entry that no input has reached yet may be reached by the next one
        unreached = unseen * square / trace / n if trace > 0 else 0.0
        variance = _entry_variance(entry, sums, design) * inflation
        effective = _effective(entry.total, entry.square).clamp(min=1)
        factor = _student(1 / effective)
        errors[name] = (variance * factor.square() + unreached**2).sqrt()
        if design.is_no_sample(sums):
            errors[name].fill_(math.inf)
    return diagonal, errors


def entries_rel_error(sums: FisherSums, design: SampleDesign, chosen: Mapping[str, Tensor]) -> float:
    """Return the relative error of some entries together; NaN where it is not known.

    Args:
        sums: Sums over the inputs of all processes.
        design: How the inputs were chosen.
        chosen: A boolean tensor for each parameter with chosen entries, in its shape.
    """
    variance = square = 0.0
    for name, mask in chosen.items():
        entry = sums.entries[name]
        keep = mask.to(entry.total.device)
        variance += float(_entry_variance(entry, sums, design)[keep].sum())
        square += float((entry.total[keep] / max(sums.inputs, 1)).square().sum())
    norm_square = square - variance
    if design.is_no_sample(sums):
        return math.nan
    return math.sqrt(variance / norm_square) if norm_square > 0 else math.nan


def drift(sums: FisherSums) -> tuple[bool, float]:
    """Return whether batches differ by more than their inputs explain, and the ratio of variances.

    Sorted data have a drift: their inputs are no independent sample. The ratio, at least 1, is the
    design effect by which it enlarges the variance of the mean.
    """
    n, batches = sums.inputs, sums.batches
    if batches < MIN_DRIFT_BATCHES:
        return False, 1.0
    trace, square, batch = (
        float(sums.column(name)[-1]) for name in ("trace", "trace_square", "batch_trace")
    )
    within = (square - trace**2 / n) / max(n - 1, 1)
    if within <= 0:
        return False, 1.0
    ratio = (batch - trace**2 / n) / (batches - 1) / within
    drifts = ratio > 1 + DRIFT_ERRORS * math.sqrt(2 / (batches - 1))
    return drifts, max(1.0, ratio)


def _sample_variance(square: Tensor, total_square: Tensor, n: int) -> Tensor:
    """The sample variance over n inputs; infinite for one of them. Rounding below zero is cut."""
    if n < 2:
        return torch.full_like(square, math.inf)
    return ((square - total_square / n) / (n - 1)).clamp(min=0)


def _mean_variance(between: Tensor, label: Tensor, sums: FisherSums, design: SampleDesign) -> Tensor:
    """The variance of the mean over the inputs.

    Args:
        between: Sample variance over inputs, with the part of the labels.
        label: Mean of the label variance.
        sums: Sums over the inputs.
        design: How the inputs were chosen.
    """
    n = max(sums.inputs, 1)
    fraction = design.fraction(n)
    if not sums.knows_labels:  # one label each: both parts together are an upper limit
        fraction = 0.0
    if fraction == 0:
        return between / n
    seen = label.clamp(min=0) * fraction
    return (seen if fraction == 1 else (1 - fraction) * between + seen) / n


def _entry_variance(entry: EntrySums, sums: FisherSums, design: SampleDesign) -> Tensor:
    n = max(sums.inputs, 1)
    between = _sample_variance(entry.square, entry.total.square(), n)
    return _mean_variance(between, entry.label / n, sums, design)


def _ratio(variance: Tensor, norm_square: Tensor) -> Tensor:
    """√(variance / norm²); NaN where the debiased norm is not positive."""
    known = norm_square > 0
    return torch.where(known, variance / norm_square.where(known, 1), torch.nan).sqrt()


def _effective(total: Tensor, square: Tensor) -> Tensor:
    return torch.where(square > 0, total.square() / square.where(square > 0, 1), 0)


def _label_share(between: Tensor, sums: FisherSums, design: SampleDesign, label: Tensor) -> Tensor:
    """The labels' share of the variance of the mean."""
    fraction = design.fraction(sums.inputs) if sums.knows_labels else 0.0
    seen = fraction * label.clamp(min=0)
    whole = (1 - fraction) * between.nan_to_num(posinf=0) + seen
    return torch.where(whole > 0, seen / whole.where(whole > 0, 1), 0)


def _combined_spread(
    of_inputs: Tensor, between: Tensor, sums: FisherSums, design: SampleDesign
) -> Tensor:
    """Relative standard error of the relative error, with the part of the labels."""
    n, label = max(sums.inputs, 1), sums.column("label")
    share = _label_share(between, sums, design, label / n)
    of_labels = _relative_square(sums.column("label_square"), label) / 4
    return (((1 - share) * of_inputs.nan_to_num()).square() + share.square() * of_labels).sqrt()


def _relative_square(square: Tensor, total: Tensor) -> Tensor:
    """Σv²/(Σv)²: the relative variance of a sum of independent non-negative terms, at most."""
    return torch.where(total > 0, square / total.where(total > 0, 1).square(), 0)


def _widening(between: Tensor, variance: Tensor, sums: FisherSums, design: SampleDesign) -> Tensor:
    """The factor on standard errors for the uncertainty of the variance and for skewness.

    The variance has ν = 2/(its relative variance) degrees of freedom. The quantile of Student's t at
    2 is expanded to second order in 1/ν. For skewness see ``fimprobe.estimators.reliability``.

    Args:
        between: Sample variance of the inputs' shares t of the trace.
        variance: Variance of the mean of t.
        sums: Sums over the inputs.
        design: How the inputs were chosen.
    """
    n, column = max(sums.inputs, 1), sums.column
    mean = column("trace") / n
    square, cube, fourth = (column(f"trace_{p}") / n for p in ("square", "cube", "fourth"))
    deviation = (square - mean.square()).clamp(min=0)
    third = cube - 3 * mean * square + 2 * mean**3
    central = fourth - 4 * mean * cube + 6 * mean.square() * square - 3 * mean**4
    known = deviation > 1e-12 * square
    safe = deviation.where(known, 1)
    skewness = torch.where(known, third / safe**1.5, 0)
    of_inputs = torch.where(known, (central / safe.square() - 1) / n, 0).clamp(min=0)
    of_labels = _relative_square(column("trace_label_square"), column("trace_label"))
    share = _label_share(between, sums, design, column("trace_label") / n)
    relative = (1 - share).square() * of_inputs + share.square() * of_labels
    student = _student(relative)
    skewed = 1 + (7 / 6 * skewness.square() * (1 - share).square() + 7 / 4) / n
    return torch.where(variance > 0, torch.maximum(student, skewed), 1)


def _student(relative: Tensor) -> Tensor:
    """Student's quantile at 2 standard errors, over 2, for a variance of that relative variance."""
    inverse = relative.clamp(max=1) / 2
    return 1 + 1.25 * inverse + 1.53 * inverse.square()


def _spread(sums: FisherSums, norm_square: Tensor) -> Tensor:
    """Relative standard error of the relative error over inputs, by the delta method.

    ρ² = (M − f)/((n − 1) f), where M is the mean of Q_b and f = ‖diag F‖². An input's influence on f
    is 2(a_b·F − f). The model of the inner product is proportional to √Q_b, with the right mean.
    """
    n = max(sums.inputs, 2)
    mean = sums.column("square") / n
    root = sums.column("root") / n
    usable = (norm_square > 0) & (mean > norm_square) & (root > 0)
    excess = (mean - norm_square).where(usable, 1)
    slope = 2 * mean / excess
    root = root.where(usable, 1)
    variance = (sums.column("fourth") / n - mean.square()) / excess.square()
    variance = variance + slope.square() * (mean / root.square() - 1)
    product = sums.column("square_root_product") / n / root - mean
    variance = (variance - 2 * slope * product / excess).clamp(min=0)
    return torch.where(usable, (variance / n).sqrt() / 2, torch.nan)
