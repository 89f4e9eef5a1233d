"""Which computation a diagonal is: stated where one candidate fits within noise and no other does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.fisher.audit.candidates import CandidateMeasurer, InputSquares
from fimprobe.fisher.audit.comparison import cosine_of, sine
from fimprobe.fisher.audit.fits import (
    TOLERANCE,
    CandidateFit,
    DataSize,
    fit_given_batches,
    fit_inputs,
)
from fimprobe.fisher.audit.labellings import MODEL, Labelling, make_labellings
from fimprobe.fisher.audit.noisy_fits import NoisyCandidates
from fimprobe.fisher.audit.simulation import store_gradients
from fimprobe.report.format import number, percent

ZERO = 1e-9
"""Share of tr F below which a diagonal is zero up to rounding."""

OF_MODEL, OF_DRAWS = "labels of the model", "labels drawn from the model"

AGREE = ", which agree here"

NEAREST = 3
"""Number of candidates that are named where none fits."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a diagonal is.

    Attributes:
        sentence: The one candidate that fits; None if none or several do, or one that fits much.
        candidates: All that were tried, those that fit first.
        notes: What was not tried, and why.
    """

    sentence: str | None
    candidates: list[CandidateFit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return the diagnosis in sentences, whether or not a candidate fits."""
        if self.sentence is not None:
            return self.sentence
        fitting = group_fits(self.candidates)
        if fitting:
            named = "; or ".join(_phrase(group) for group in fitting)
            if len(fitting) == 1:
                return (
                    "One candidate fits within noise, but batches with drawn labels have so much "
                    f"noise that none is stated: {named}."
                )
            return f"Several candidates fit within noise, so that none is stated: {named}."
        if not self.candidates:
            return "No candidate could be computed."
        nearest = "; ".join(
            f"{_phrase([fit])} (off by {percent(fit.error)}, by noise alone "
            f"{percent(fit.noise_error)})"
            for fit in self.candidates[:NEAREST]
        )
        return f"No candidate fits within noise. The nearest: {nearest}."


def diagnose(
    theirs: Tensor,
    reference: InputSquares,
    measurer: CandidateMeasurer,
    seed: int,
) -> Diagnosis:
    """Return the diagnosis.

    Args:
        theirs: The diagonal as a vector on the CPU, float64.
        reference: The estimate of F.
        measurer: Measures the candidates.
        seed: For random batches and labels.
    """
    if float(theirs.abs().sum()) <= ZERO * float(reference.second.sum()):
        return Diagnosis(
            sentence="`theirs` is zero up to rounding, as is the square of an expected score: the "
            "expectation over labels was taken before the square."
        )
    family, data = measurer.measurer.likelihood, measurer.data
    labellings = make_labellings(family)
    missing = _why_no_labels(measurer)
    notes = []
    if missing:
        notes.append(f"Candidates with labels of the data are left out: {missing}")
        labellings = [one for one in labellings if not one.needs_labels]
    squares = {MODEL: reference, **measurer.input_squares(labellings)}
    kept = _distinct(labellings, squares)
    words = {MODEL: OF_MODEL, **{one.key: one.words for one in kept}}
    shown = {key: squares[key] for key in words}
    inputs = data.source.size or data.inputs_read
    size = DataSize(inputs=inputs, batch_size=data.batch_size, labels=_labels_per_input(measurer))
    fits = fit_inputs(theirs, shown, words, size)
    whole = data.max_inputs is None or data.max_inputs >= inputs
    if data.is_ordered and whole and (data.batch_size or 1) > 1:
        given = measurer.given_batch_squares(kept)
        for one in kept:
            fits += fit_given_batches(theirs, given[one.key], one, size)
    if not any(fit.fits for fit in fits):
        if whole:
            stored = store_gradients(measurer, kept, reference.second, seed)
            noisy = NoisyCandidates(
                theirs=theirs[stored.entries],
                expected={key: x.second[stored.entries] for key, x in shown.items()},
                stored=stored,
                words={**words, MODEL: OF_DRAWS},
                size=size,
            )
            fits += noisy.fits()
        else:
            notes.append("Random batches and drawn labels were not tried: that takes all inputs.")
    ranked = sorted(fits, key=lambda fit: (not fit.fits, fit.excess))
    fitting = group_fits(ranked)
    sentence = None
    if len(fitting) == 1 and not _is_vague(fitting[0][0]):
        sentence = f"`theirs` is {_phrase(fitting[0])}{_remedy(fitting[0][0])}."
    return Diagnosis(sentence=sentence, candidates=ranked, notes=notes)


def _why_no_labels(measurer: CandidateMeasurer) -> str:
    """Why the labels of the data cannot be used, in a sentence; empty if they can."""
    batch, mask, labels = next(measurer.data.batches())
    if labels is None:
        return "the batches are no pairs of inputs and labels. Pass `labels`."
    outputs = measurer.measurer.outputs(batch, mask)
    try:
        measurer.measurer.likelihood.check_labels(outputs, labels.to(outputs.device))
    except FimprobeError as error:
        return str(error)
    return ""


def _labels_per_input(measurer: CandidateMeasurer) -> float:
    """Number of labels of an input: the mean of the first batch."""
    batch, mask, _ = next(measurer.data.batches())
    shape = measurer.measurer.likelihood.label_shape(measurer.measurer.outputs(batch, mask))
    labels = shape.numel() if mask is None else int(mask.sum())
    return labels / batch.size


def _distinct(labellings: list[Labelling], squares: dict[str, InputSquares]) -> list[Labelling]:
    """The labellings that differ on these data; equal ones are one, and zero ones none."""
    kept: list[Labelling] = []
    for one in labellings:
        x = squares[one.key].second
        if float(x.sum()) <= ZERO * float(squares[MODEL].second.sum()):
            continue
        equal = [i for i, other in enumerate(kept) if _agree(x, squares[other.key].second)]
        if equal:
            first = kept[equal[0]]
            both = f"{first.words.removesuffix(AGREE)} or {one.words}{AGREE}"
            kept[equal[0]] = replace(first, words=both)
        else:
            kept.append(one)
    return kept


def _agree(one: Tensor, other: Tensor) -> bool:
    cosine = cosine_of(one, other)
    ratio = float(one.sum() / other.sum())
    return cosine is not None and sine(cosine) <= TOLERANCE and abs(ratio - 1) <= 2 * TOLERANCE


def group_fits(fits: list[CandidateFit]) -> list[list[CandidateFit]]:
    """Return the fits by what was squared: only then do they differ in more than their scale."""
    groups: dict[tuple[str, bool], list[CandidateFit]] = {}
    for fit in fits:
        if fit.fits:
            groups.setdefault((fit.labels, fit.batch_size > 1), []).append(fit)
    return list(groups.values())


def _is_vague(fit: CandidateFit) -> bool:
    """Whether a candidate fits much: few batches, and labels of which simulations know few."""
    return fit.batch_size > 1 and fit.labels == OF_DRAWS


def _phrase(fits: list[CandidateFit]) -> str:
    """Candidates that square the same gradients in words, without "`theirs` is"."""
    first = fits[0]
    if first.batch_size > 1:
        ways = " or, ".join(f"{_batches(fit)}, {_scale(fit)}" for fit in fits)
        return f"the squared gradient of batches with {first.labels}: {ways}"
    subject = f"the squared gradient of each input with {first.labels}"
    return f"{'F' if first.labels == OF_MODEL else subject}, {_scale(first)}"


def _batches(fit: CandidateFit) -> str:
    size = f"batches of {fit.batch_size}"
    if fit.as_given:
        return f"{size} as given"
    low, high = fit.batch_range or (fit.batch_size, fit.batch_size)
    return size if low == high else f"{size} ({low} to {high})"


def _scale(fit: CandidateFit) -> str:
    if fit.scale_words:
        return fit.scale_words
    base = "a mean over inputs" if fit.batch_size == 1 else "a mean over batches"
    return f"{base} times {number(fit.scale)}, which no usual convention explains"


def _remedy(fit: CandidateFit) -> str:
    """What separates a candidate from F."""
    if fit.labels == OF_MODEL:
        return "" if abs(fit.scale - 1) <= 2 * TOLERANCE else f": divide it by {number(fit.scale)}"
    if fit.batch_size > 1:
        return ". The square of a batch's gradient is not the mean of squares"
    if "drawn from the model" in fit.labels:
        return ": it is unbiased, with the noise of the labels"
    return ". F takes the expectation over the labels of the model"
