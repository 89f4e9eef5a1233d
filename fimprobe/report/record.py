"""Values and descriptions from a report's record (``Report.to_dict``, or a line of a file)."""

from __future__ import annotations

import math
from typing import Any

from fimprobe.report.format import count_with_error, quantity

Record = dict[str, Any]
"""A report as ``to_dict`` returns it, or as it is read from a file."""

SIZE_BIASED = (
    "size-biased labels: drawn more often where their gradient is large, and weighted back, so that "
    "F stays the same"
)
"""What a reader must know of drawn labels."""

TRUSTED_ERROR = 0.1
"""Relative error up to which the F of a layer is called trusted."""

FROZEN = "left out: frozen"
"""Coverage of a parameter that training does not change."""


def pairs_needed(estimate: Record) -> float | None:
    """Return the (input, label) pairs for 10 %, also from a file of an older version."""
    pairs: float | None = estimate.get("pairs_for_10_percent", estimate.get("draws_for_10_percent"))
    return pairs


def format_pairs(estimate: Record) -> str:
    """Return the pairs for 10 % ± their standard error.

    >>> format_pairs({"pairs_for_10_percent": 1622.0, "pairs_error": 0.1234})
    '1,620 ± 200'
    """
    return count_with_error(pairs_needed(estimate), estimate.get("pairs_error"))


def error_with_drawn_labels(estimate: Record, inputs: int, *, at: int | None = None) -> float | None:
    """Return the relative error of an estimator with one label from the model for each input.

    Args:
        estimate: The record of an estimate.
        inputs: Number of inputs of its report.
        at: Number of inputs that the error is for; None for those of the report.

    >>> error_with_drawn_labels({"draws_for_10_percent": 800.0}, 8)  # from an older version's file
    1.0
    >>> error_with_drawn_labels({"one_label_error": 1.0}, 8, at=32)
    0.5
    """
    error: float | None = estimate.get("one_label_error")
    if "one_label_error" not in estimate:
        pairs = pairs_needed(estimate)
        error = None if pairs is None else 0.1 * (max(pairs, 0.0) / inputs) ** 0.5
    return None if error is None else error * (inputs / (at or inputs)) ** 0.5


def rank_layers(record: Record, top: int | None) -> list[tuple[str, Record]]:
    """Return the layers that need the most inputs, before them those whose need is unknown.

    Args:
        record: The record of a report.
        top: Number of layers; None for all.

    Returns:
        (name, group) of each layer; layers of equal need in the model's order.
    """
    return sorted(record["layers"].items(), key=lambda layer: -_need(layer[1]["i1"]))[:top]


def _need(estimate: Record) -> float:
    """Return the error that the inputs needed grow with; infinity where it is unknown."""
    error: float | None = estimate.get("rel_error")
    if error is None:
        return 0.0 if is_zero(estimate) else math.inf
    return error


def is_zero(estimate: Record) -> bool:
    """Return whether F is zero, and not unknown."""
    return estimate.get("trace") == 0 and not estimate.get("norm")


def describe_hidden(record: Record, top: int) -> str:
    """Return which layers a table of ``top`` layers does not show; "" where it shows all.

    Args:
        record: The record of a report.
        top: Number of layers in the table.

    >>> layers = {name: {"i1": {"rel_error": error}} for name, error in (("a", 0.1), ("b", 0.2))}
    >>> describe_hidden({"layers": layers}, 1)
    '1 layer with the smallest need is not shown'
    """
    layers = rank_layers(record, None)
    hidden = layers[top:]
    if not hidden:
        return ""
    if _need(layers[-1][1]["i1"]) == math.inf:
        return f"the first {top:,} of {len(layers):,} layers, in the model's order"
    unknown = sum(_need(group["i1"]) == math.inf for _, group in hidden)
    verb = "is" if len(hidden) == 1 else "are"
    if unknown:
        return f"{quantity(len(hidden), 'layer')} {verb} not shown, {unknown:,} of unknown need"
    return f"{quantity(len(hidden), 'layer')} with the smallest need {verb} not shown"


def describe_labels(record: Record) -> str:
    """Return the number of labels and how they were sampled, in words.

    >>> describe_labels({"draws": 2, "label_sampling": "size_biased"})
    '2 size-biased labels for each input'
    >>> describe_labels({"draws": 1})
    '1 label from the model for each input'
    """
    if record["draws"] == "exact":
        return "exact labels"
    noun = "label" if record["draws"] == 1 else "labels"
    size_biased = label_sampling_of(record) == "size_biased"
    labels = f"size-biased {noun}" if size_biased else f"{noun} from the model"
    return f"{record['draws']} {labels} for each input"


def label_sampling_of(record: Record) -> str:
    """Return how labels were sampled; older versions drew all labels from the model."""
    sampling = record.get("label_sampling")
    return sampling or ("exact" if record["draws"] == "exact" else "model")


def describe_inputs(record: Record) -> str:
    """Return the number of inputs in words."""
    return f"{record['batch_size']:,} input{'' if record['batch_size'] == 1 else 's'}"


def inputs_needed(rel_error: float, inputs: int) -> float:
    """Return the inputs for a relative error of 10 %, measured like those of a report.

    Above 1,000 they have three digits, as the numbers of pairs next to them.

    Args:
        rel_error: The relative error of the report, above 10 %.
        inputs: Number of its inputs, which are too few.
    """
    needed = inputs * (rel_error / TRUSTED_ERROR) ** 2
    return max(needed if needed < 1e3 else float(f"{needed:.3g}"), inputs + 1)


def judge(estimate: Record) -> str:
    """Return the first word of the verdict: "zero", "unknown", "trusted" or "needs".

    Args:
        estimate: ``trace``, ``norm`` and ``rel_error`` of Î₁.
    """
    if is_zero(estimate):
        return "zero"
    error = estimate.get("rel_error")
    if error is None:
        return "unknown"
    return "trusted" if error <= TRUSTED_ERROR else "needs"


def verdict(estimate: Record, inputs: int) -> str:
    """Return in a few words whether a report's F is reliable to 10 %.

    Args:
        estimate: ``trace``, ``norm`` and ``rel_error`` of Î₁.
        inputs: Number of inputs of the report.

    >>> verdict({"trace": 1.0, "norm": 1.0, "rel_error": 0.3}, 32)
    'needs 288 inputs'
    """
    word = judge(estimate)
    if word != "needs":
        return word
    return f"needs {quantity(inputs_needed(estimate['rel_error'], inputs), 'input')}"


def summary_line(record: Record) -> str:
    """Return one line on what was measured, and how."""
    return " · ".join(
        [
            f"fimprobe · step {record['step']:,}",
            f"{describe_inputs(record)}, {describe_labels(record)}",
            record["likelihood"],
            f"{record['seconds']:.3g} s",
        ]
    )
