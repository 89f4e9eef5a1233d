"""Whether a diagonal is one of the candidates within noise, and how it is scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fimprobe.fisher.audit.candidates import BatchSquares, InputSquares
from fimprobe.fisher.audit.comparison import cosine_of, sine
from fimprobe.fisher.audit.labellings import Labelling

TOLERANCE = 0.01
"""Relative error below which a diagonal is a candidate without noise: float32 and sums' order."""

NOISE_FACTOR = 1.5
"""Factor by which an error may exceed the expected one of noise."""


@dataclass(frozen=True, kw_only=True)
class CandidateFit:
    """How near a diagonal is to one candidate.

    Attributes:
        labels: The labels in words.
        batch_size: Inputs whose gradients are summed before they are squared; 1 for squares of each.
        batch_range: Smallest and largest batch size that fits; None where it is known.
        as_given: Whether the batches are those of the data, in their order.
        scale: Diagonal over candidate, which is a mean over inputs or batches.
        scale_words: What the scale means; empty where it is unusual.
        error: Relative error after the best rescaling.
        noise_error: The error that noise explains.
        fits: Whether the two agree.
        deviation: Largest deviation along the functions by which candidates differ, in standard
            deviations of simulations; 0 where there are none.
    """

    labels: str
    batch_size: int
    batch_range: tuple[int, int] | None = None
    as_given: bool = False
    scale: float
    scale_words: str
    error: float
    noise_error: float
    fits: bool
    deviation: float = 0.0

    @property
    def excess(self) -> float:
        """The error over the largest one that counts as a fit, for candidates without replicates."""
        return self.error / max(TOLERANCE, NOISE_FACTOR * self.noise_error)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How squares of batch gradients are scaled.

    Attributes:
        weighted: Whether gradients are sums over the batch, not means.
        divisor: "batches", "inputs" or "none".
        words: In a sentence.
    """

    weighted: bool
    divisor: str
    words: str

    def divide(self, batches: int, inputs: int) -> float:
        """Return the divisor.

        Args:
            batches: Number of batches.
            inputs: Number of inputs.
        """
        return float({"batches": batches, "inputs": inputs, "none": 1}[self.divisor])


CONVENTIONS = (
    Convention(weighted=False, divisor="batches", words="averaged over batches"),
    Convention(weighted=False, divisor="none", words="summed over batches, not averaged"),
    Convention(weighted=False, divisor="inputs", words="summed over batches, divided by the inputs"),
    Convention(
        weighted=True,
        divisor="batches",
        words="of gradients that are sums over the batch, averaged over batches",
    ),
    Convention(
        weighted=True,
        divisor="inputs",
        words="of gradients that are sums over the batch, divided by the number of inputs",
    ),
    Convention(
        weighted=True,
        divisor="none",
        words="of gradients that are sums over the batch, summed over batches",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Numbers by which code divides, or forgets to.

    Attributes:
        inputs: Number of inputs N.
        batch_size: Inputs of a batch as given; None if there are no batches.
        labels: Labels of an input; not a whole number where inputs differ.
    """

    inputs: int
    batch_size: int | None
    labels: float

    def over_labels(self) -> str:
        """Return what a mean over the labels of an input adds to a sentence."""
        return f", of gradients averaged over the {self.labels:g} labels of an input"


def fit_inputs(
    theirs: Tensor,
    candidates: Mapping[str, InputSquares],
    words: Mapping[str, str],
    size: DataSize,
) -> list[CandidateFit]:
    """Compare with squares of every input's gradient.

    Args:
        theirs: The diagonal as a vector.
        candidates: Squares by labelling.
        words: The labels in words.
        size: For the words of the scale.
    """
    fits = []
    for key, squares in candidates.items():
        cosine = cosine_of(theirs, squares.second)
        if cosine is None:
            continue
        error, ratio = sine(cosine), squares.rel_error
        noise = ratio / math.sqrt(1 + ratio**2)
        scale = float(theirs @ squares.second / squares.second.square().sum()) * (1 + ratio**2)
        tolerance = max(2 * TOLERANCE, 2 * ratio)
        fits.append(
            CandidateFit(
                labels=words[key],
                batch_size=1,
                scale=scale,
                scale_words=describe_input_scale(scale, size, tolerance),
                error=error,
                noise_error=noise,
                fits=error <= max(TOLERANCE, NOISE_FACTOR * noise),
            )
        )
    return fits


def describe_input_scale(scale: float, size: DataSize, tolerance: float) -> str:
    """Return the scale of a mean over inputs in words; empty where no convention has it.

    Args:
        scale: Diagonal over the mean.
        size: Numbers of inputs, batches and labels.
        tolerance: Relative deviation at which a scale counts as one of a convention.
    """
    inputs, batch_size = size.inputs, size.batch_size
    known = [
        (1.0, f"averaged over the {inputs:,} inputs"),
        (float(inputs), f"summed over the {inputs:,} inputs, not averaged (N forgotten)"),
        (1 / inputs, f"divided by the {inputs:,} inputs twice"),
        (0.5, "averaged over inputs, times ½"),
        (2.0, "averaged over inputs, times 2"),
    ]
    if batch_size is not None and batch_size > 1:
        known += [
            (float(batch_size), f"divided by the number of batches of {batch_size}, not of inputs"),
            (1 / batch_size, f"divided by the batch size {batch_size} once too often"),
            (1 / batch_size**2, f"of gradients divided by the batch size {batch_size}, averaged"),
        ]
    if size.labels > 1:
        over_labels = size.over_labels()
        known += [(value / size.labels**2, text + over_labels) for value, text in known]
    near = [text for value, text in known if abs(scale / value - 1) <= tolerance]
    return " or ".join(near)


def fit_given_batches(
    theirs: Tensor, squares: BatchSquares, labelling: Labelling, size: DataSize
) -> list[CandidateFit]:
    """Compare with squares of the gradients of the batches as given.

    Args:
        theirs: The diagonal as a vector.
        squares: Sums over these batches.
        labelling: The labels.
        size: For the words of the scale.
    """
    fits, inputs = [], sum(squares.sizes)
    for weighted, x in ((False, squares.plain), (True, squares.weighted)):
        cosine = cosine_of(theirs, x)
        if cosine is None:
            continue
        factor = float(theirs @ x / x.square().sum())
        conventions = [c for c in CONVENTIONS if c.weighted == weighted]
        scales = {c: factor * c.divide(len(squares.sizes), inputs) for c in conventions}
        near = [c for c, scale in scales.items() if abs(scale - 1) <= 2 * TOLERANCE]
        over_labels = ""
        if not near and size.labels > 1:
            relative = {c: scale * size.labels**2 for c, scale in scales.items()}
            near = [c for c, scale in relative.items() if abs(scale - 1) <= 2 * TOLERANCE]
            over_labels = size.over_labels()
        chosen = near[0] if near else conventions[0]
        fits.append(
            CandidateFit(
                labels=labelling.words,
                batch_size=max(squares.sizes),
                as_given=True,
                scale=scales[chosen],
                scale_words=near[0].words + over_labels if near else "",
                error=sine(cosine),
                noise_error=0.0,
                fits=sine(cosine) <= TOLERANCE,
            )
        )
    # batches of one size do not tell sums from means: the usual scale does
    named = [fit for fit in fits if fit.fits and fit.scale_words]
    return named[:1] or sorted(fits, key=lambda fit: fit.error)[:1]
