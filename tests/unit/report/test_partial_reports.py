"""Reports that leave parts out: which one a reader is shown, and why the others are shorter."""

from dataclasses import replace

import pytest

from fimprobe.report.format import percent, with_error
from fimprobe.report.partial_reports import (
    NO_BOUNDS_NOTE,
    PREVIEW,
    describe_earlier,
    earlier_whole_report,
    is_partial,
)
from fimprobe.report.record import format_pairs
from fimprobe.report.table import format_table
from tests.support.reports import build_report

WHOLE, NO_BOUNDS, SHORT = [], [NO_BOUNDS_NOTE], [f"{PREVIEW}only Î₁ was measured."]


def records(*notes):
    """A report every 40 steps with the notes of each; previews have no Î₂."""
    return [
        replace(build_report(3, 40 * i, i2=note is not SHORT), notes=note).to_dict()
        for i, note in enumerate(notes)
    ]


@pytest.mark.parametrize(
    ("notes", "place"),
    [
        ([WHOLE], None),
        ([SHORT, SHORT], None),  # there is nothing better
        ([SHORT, WHOLE, NO_BOUNDS], None),
        ([WHOLE, SHORT], 0),
        ([WHOLE, NO_BOUNDS, SHORT, SHORT], 1),
    ],
)
def test_what_a_preview_lacks_is_in_the_last_whole_report(notes, place):
    reports = records(*notes)
    assert earlier_whole_report(reports) is (None if place is None else reports[place])


def test_what_an_earlier_report_measured_is_stated_with_its_step():
    (whole,), (short,) = records(WHOLE), records(SHORT)
    second = whole["total"]["i2"]
    assert describe_earlier(whole) == (
        f"Î₂ was last measured at step 0: trace {with_error(second['trace'], second['std_error'])}, "
        f"error {percent(second['rel_error'])}, an error of 10 % takes {format_pairs(second)} "
        "(input, label) pairs."
    )
    assert describe_earlier(short) == "The bounds were last measured at step 0."


def test_a_record_of_an_older_version_has_no_notes():
    (record,) = records(WHOLE)
    del record["notes"]
    assert earlier_whole_report([record]) is None


@pytest.mark.parametrize("note", [NO_BOUNDS, SHORT])
def test_bounds_that_a_schedule_left_out_are_not_called_switched_off(note):
    (record,) = records(note)
    for group in (record["total"], *record["layers"].values()):
        for estimate in (group["i1"], group.get("i2", {})):
            estimate |= dict.fromkeys(("tightness", "trace_tightness", "diagonal_tightness"))
    text = format_table(record, view="bounds")
    assert is_partial(record["notes"]) and note[0] in text
    assert "bounds=True" not in text
