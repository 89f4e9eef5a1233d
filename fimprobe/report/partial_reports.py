"""Reports that leave parts out because of a time budget: their notes, and how readers find them."""

from __future__ import annotations

from collections.abc import Sequence

from fimprobe.report.format import percent, with_error
from fimprobe.report.record import Record, format_pairs, pairs_needed

PREVIEW = "Preview: "
"""The beginning of the note of a preview."""

NO_BOUNDS_NOTE = (
    "The bounds, and Î₂'s variance in whole blocks, are left out of this report, because they would "
    "take most of its time. Under a time budget they are part of every second report that is no "
    'preview; use schedule={"every": 100} to measure everything at each report.'
)


def is_preview(notes: Sequence[str]) -> bool:
    """Return whether a report with these notes measured Î₁ only."""
    return any(note.startswith(PREVIEW) for note in notes)


def is_partial(notes: Sequence[str]) -> bool:
    """Return whether a report with these notes leaves parts out because of a time budget."""
    return NO_BOUNDS_NOTE in notes or is_preview(notes)


def earlier_whole_report(reports: Sequence[Record]) -> Record | None:
    """Return the last report that has what the last one lacks as a preview; None without one."""
    if not is_preview(reports[-1].get("notes", [])):
        return None
    whole = (report for report in reversed(reports) if not is_preview(report.get("notes", [])))
    return next(whole, None)


def describe_earlier(report: Record) -> str:
    """Return what was measured last in an earlier report, with its values of Î₂.

    Args:
        report: The record of that report.
    """
    step, estimate = f"at step {report['step']:,}", report["total"].get("i2")
    if estimate is None:
        return f"The bounds were last measured {step}."
    values = [f"trace {with_error(estimate['trace'], estimate.get('std_error'))}"]
    if estimate.get("rel_error") is not None:
        values.append(f"error {percent(estimate['rel_error'])}")
    if pairs_needed(estimate) is not None:
        values.append(f"an error of 10 % takes {format_pairs(estimate)} (input, label) pairs")
    return f"Î₂ was last measured {step}: {', '.join(values)}."
