"""The main numbers of a run, as the first thing that its page shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from fimprobe.estimators.names import SYMBOLS, UNBIASED_KEYS
from fimprobe.report.format import percent, quantity, with_error
from fimprobe.report.reasons import why_unknown, without_numbers
from fimprobe.report.record import (
    TRUSTED_ERROR,
    Record,
    describe_inputs,
    describe_labels,
    error_with_drawn_labels,
    format_pairs,
    inputs_needed,
    pairs_needed,
)

_Number: TypeAlias = "tuple[float | None, str]"
"""A value, None if it is unknown, and its text."""


def make_tiles(reports: Sequence[Record]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the main numbers of the whole model at the last report, with what they mean.

    A number that is unknown there has its reason, and its value at the last report that knows it.

    Args:
        reports: The records of a run, at least one.

    Returns:
        Text and meaning of each number: of the error by Î₁, the inputs it takes and the trace; and of
        the others.
    """
    last = reports[-1]
    total, inputs = last["total"], describe_inputs(last)
    keys = [key for key in UNBIASED_KEYS if key in total]
    tiles: list[tuple[str, str]] = []
    stated: set[str] = set()

    def add(key: str, field: str, read: Callable[[Record], _Number], meaning: str) -> None:
        """Add a tile; the first one without a value for a cause states the reason.

        Args:
            key: Key of the estimator.
            field: Field of the estimate.
            read: From a record to the value, None if it is unknown, and its text.
            meaning: Description of the value.
        """
        value, shown = read(last)
        reason = "" if value is not None else why_unknown(last, total, key, field)
        cause = without_numbers(reason)
        if reason and cause not in stated:
            meaning += f". Unknown: {reason}"
        stated.add(cause)
        known = [r for r in reports if read(r)[0] is not None] if value is None else []
        if known:
            meaning += f". Last known at step {known[-1]['step']:,}: {read(known[-1])[1]}"
        tiles.append((shown, meaning))

    sample = f"{inputs}, {describe_labels(last)}"
    first = partial(_read_error, key="i1")
    add("i1", "rel_error", first, f"error of this report, how far off its F is: {sample}")
    meaning = f"for an error of 10 % by Î₁; this report has {inputs}"
    if (first(last)[0] or math.inf) <= TRUSTED_ERROR:
        meaning = "of this report are enough for an error of 10 % by Î₁"
    add("i1", "rel_error", _read_inputs, meaning)
    add("i1", "trace", partial(_read_trace, key="i1"), "trace of F by Î₁ ± its standard error")
    for key in keys[1:]:
        read = partial(_read_error, key=key)
        if read(last)[1] != first(last)[1]:  # with exact labels both are that of the inputs
            add(key, "rel_error", read, f"error of this report by {SYMBOLS[key]}: {sample}")
    for key in keys:
        draw = "1 random vector" if key == "ih" else "1 label from the model"
        meaning = f"error with 1 label, {SYMBOLS[key]}: {inputs}, {draw} for each"
        add(key, "one_label_error", partial(_read_one_label_error, key=key), meaning)
    meaning = "(input, label) pairs, one label from the model each, for an error of 10 % by Î₁"
    add("i1", "pairs_for_10_percent", _read_pairs, meaning)
    for key in keys[1:]:
        meaning = f"trace of F by {SYMBOLS[key]} ± its standard error"
        add(key, "trace", partial(_read_trace, key=key), meaning)
    return tiles[:3], tiles[3:]


def _read_error(record: Record, *, key: str) -> _Number:
    error = record["total"].get(key, {}).get("rel_error")
    return error, percent(error)


def _read_inputs(record: Record) -> _Number:
    error, inputs = record["total"]["i1"].get("rel_error"), record["batch_size"]
    if error is None:
        return None, "–"
    needed = inputs if error <= TRUSTED_ERROR else inputs_needed(error, inputs)
    return needed, quantity(needed, "input")


def _read_one_label_error(record: Record, *, key: str) -> _Number:
    error = error_with_drawn_labels(record["total"].get(key, {}), record["batch_size"])
    return error, percent(error)


def _read_pairs(record: Record) -> _Number:
    estimate = record["total"]["i1"]
    return pairs_needed(estimate), format_pairs(estimate)


def _read_trace(record: Record, *, key: str) -> _Number:
    estimate = record["total"].get(key, {})
    trace = estimate.get("trace")
    return trace, with_error(trace, estimate.get("std_error"))
