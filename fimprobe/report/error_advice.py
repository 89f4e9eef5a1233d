"""Sentences on the errors of a report: how large they are, and how many inputs lower them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.names import SYMBOLS, UNBIASED_KEYS
from fimprobe.report.format import listed, percent, quantity, some
from fimprobe.report.reasons import group_by_cause, shared_reason, without_numbers
from fimprobe.report.record import (
    TRUSTED_ERROR,
    Record,
    describe_inputs,
    describe_labels,
    format_pairs,
    inputs_needed,
    judge,
    verdict,
)

if TYPE_CHECKING:
    from fimprobe.report.report import Report

MAX_LAYERS = 6
"""Layers in a sentence."""

MAX_WORST = 3
"""Layers in the sentence on those that need more inputs: the table has all of them."""

OPTION, LAST_KNOWN = "`batch` is ", "Last known, "
"""The beginnings of a probe's notes where the error is unknown: the option that sets the inputs, and
the last report of the training whose error is known."""

MAX_ZERO_LAYERS = 8
"""Layers without gradient in a sentence."""


def is_of_error(note: str) -> bool:
    """Return whether a note belongs to the sentence on an unknown error."""
    return note.startswith((OPTION, LAST_KNOWN))


def _reason(estimate: Estimate) -> str:
    unknown = estimate.unknown
    return unknown.get("rel_error") or unknown.get("norm") or "it was not measured"


def error_sentences(report: Report) -> list[str]:
    """Return the errors of the whole model, of the layers and with one label for each input."""
    total = report.total.i1
    if total.trace == 0:
        return [_zero_fisher_message(report)]
    if report.seen_mass is not None and total.trace is None:
        return [
            f"Î₁ gives no estimate of F: {total.unknown['trace']}. Labels that carry F are too rare "
            "to be drawn from the model."
        ]
    verdicts = {name: judge(vars(group.i1)) for name, group in report.layers.items()}
    unknown = {
        name: _reason(report.layers[name].i1) for name, word in verdicts.items() if word == "unknown"
    }
    everywhere = _same_reason_everywhere(report, unknown)
    sentences = [_total_sentence(report, "the whole model and of each layer" if everywhere else "")]
    if len(report.layers) > 1:
        sentences += _layer_sentences(report, verdicts, {} if everywhere else unknown)
    zero = [repr(name) for name, word in verdicts.items() if word == "zero"]
    if zero:
        sentences.append(
            f"No gradient reaches {some(zero, MAX_ZERO_LAYERS)} at these inputs: F is zero there, "
            "whatever the label."
        )
    return sentences + _one_label_sentences(report)


def _same_reason_everywhere(report: Report, unknown: dict[str, str]) -> bool:
    """Return whether the errors of the model and of all layers are unknown for one cause."""
    total = report.total.i1
    if total.rel_error is not None or set(unknown) != set(report.layers):
        return False
    causes = {without_numbers(reason) for reason in unknown.values()}
    return causes == {without_numbers(_reason(total))}


def _total_sentence(report: Report, where: str) -> str:
    """Return the error of the whole model, or why that of ``where`` is unknown."""
    total, record = report.total.i1, _sampling_record(report)
    sample = f"{describe_inputs(record)}, {describe_labels(record)}"
    if total.rel_error is None:
        where = where or "the whole model"
        notes = [note for note in report.notes if is_of_error(note)]
        step = f"Step {report.step:,}: the" if notes else "The"
        unknown = f"{step} error of F of {where} at {sample} is unknown: {_reason(total)}."
        return " ".join([unknown, *notes])
    off, by, second = percent(total.rel_error), "", _error_of_i2(report)
    is_noisier = second is not None and second > total.rel_error and _has_random_vectors(report)
    if second is not None and percent(second) != off:
        by = " with Î₁"
        off = f"{off} by Î₁" if is_noisier else f"{off} by Î₁ and by {percent(second)} by Î₂"
    sentence = f"F of the whole model is off by {off} at {sample}"
    if total.rel_error > TRUSTED_ERROR:
        inputs = quantity(inputs_needed(total.rel_error, report.batch_size), "input")
        sentence += f"; an error of 10 % takes about {inputs} measured in the same way{by}"
    if by and is_noisier:
        sentence += f". Measured here with random vectors, Î₂ is off by {percent(second)}"
        exact = report.error_of("i2")
        if exact is not None:
            sentence += f"; with exact Hessians and 1 label it would be off by {percent(exact)}"
    return f"{sentence}."


def _error_of_i2(report: Report) -> float | None:
    return None if report.total.i2 is None else report.total.i2.rel_error


def _has_random_vectors(report: Report) -> bool:
    """Return whether the F in Î₂ = F − R(y) is that of Hutchinson's random vectors."""
    return report.draws is not None and "ggn" not in report.seconds_by_part


def _layer_sentences(report: Report, verdicts: dict[str, str], unknown: dict[str, str]) -> list[str]:
    """Return which layers are trusted, which need more inputs, and which errors are unknown."""
    sentences, estimates = [], {name: group.i1 for name, group in report.layers.items()}
    trusted = [name for name, word in verdicts.items() if word == "trusted"]
    imprecise = [name for name, word in verdicts.items() if word == "needs"]
    for i, name in enumerate(trusted[:MAX_LAYERS]):
        trusted[i] = f"{name!r} ({percent(estimates[name].rel_error)})"
    imprecise.sort(key=lambda name: -(estimates[name].rel_error or 0.0))
    for i, name in enumerate(imprecise[:MAX_WORST]):
        inputs = " ".join(verdict(vars(estimates[name]), report.batch_size).split()[1:-1])
        imprecise[i] = f"{name!r} takes {inputs} ({percent(estimates[name].rel_error)} now)"
    if trusted:
        sentences.append(f"Trusted to 10 %: {some(trusted, MAX_LAYERS)}.")
    if imprecise:
        sentences.append(f"More inputs are needed for 10 %: {some(imprecise, MAX_WORST)}.")
    for reasons in group_by_cause([(repr(name), reason) for name, reason in unknown.items()]):
        names = some([name for name, _ in reasons], MAX_LAYERS)
        sentences.append(f"The error of {names} is unknown: {shared_reason(reasons)}.")
    return sentences


def _one_label_sentences(report: Report) -> list[str]:
    """Return the errors of the estimators with one label from the model for each input."""
    estimates = {key: e for key in UNBIASED_KEYS if (e := report.total.get(key)) is not None}
    known = {key: e for key, e in estimates.items() if e.pairs_for(TRUSTED_ERROR) is not None}
    sample = f"With one label from the model for each of {describe_inputs(_sampling_record(report))}"
    sentences = []
    if known:
        errors = [percent(e.error_of(inputs=report.batch_size)) for e in known.values()]
        off = [f"{SYMBOLS[key]} by {error}" for key, error in zip(known, errors, strict=True)]
        off[0] = off[0].replace(" by ", " would be off by ", 1)
        if "ih" in known:
            off[-1] += " (with one random vector each)"
        needs = [f"{format_pairs(_pairs_record(e))} with {SYMBOLS[key]}" for key, e in known.items()]
        needs[0] = needs[0].replace(" with", " (input, label) pairs with", 1)
        sentences.append(f"{sample}, {listed(off)}. An error of 10 % takes {', '.join(needs)}.")
    # the first sentence has the reason of the total's error already
    total = report.total.i1
    stated = without_numbers(_reason(total)) if total.rel_error is None else ""
    missing = []
    for key, estimate in estimates.items():
        reason = estimate.unknown.get("pairs", "")
        if key not in known and reason and without_numbers(reason) != stated:
            missing.append((SYMBOLS[key], reason))
    for reasons in group_by_cause(missing):
        names = listed([name for name, _ in reasons])
        sentences.append(f"{sample}, the error of {names} is unknown: {shared_reason(reasons)}.")
    return sentences


def _sampling_record(report: Report) -> Record:
    """Return the part of the report's record that states its inputs and labels."""
    return {
        "batch_size": report.batch_size,
        "draws": "exact" if report.draws is None else report.draws,
        "label_sampling": report.label_sampling,
    }


def _pairs_record(estimate: Estimate) -> Record:
    return {
        "pairs_for_10_percent": estimate.pairs_for(TRUSTED_ERROR),
        "pairs_error": estimate.pairs_error,
    }


def _zero_fisher_message(report: Report) -> str:
    if report.draws is None or report.label_sampling == "size_biased":
        return (
            "Î₁ of the whole model is zero, whatever the label: the outputs are saturated, or mask= "
            "leaves no label."
        )
    return (
        "Î₁ of the whole model is zero: none of the drawn labels has a gradient. The outputs are "
        "saturated (draws='exact' also uses labels that are never drawn), or mask= leaves no label."
    )
