"""What a probe states when its training ends: what was measured, what was not, and why."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fimprobe.config.config import Config
from fimprobe.errors import ErrorHandler
from fimprobe.probe.notices import announce
from fimprobe.probe.run_account import RunAccount
from fimprobe.report.format import percent, quantity
from fimprobe.report.partial_reports import is_partial
from fimprobe.report.report import Report
from fimprobe.sinks.sink_group import SinkGroup
from fimprobe.training.batch_reader import BatchReader
from fimprobe.training.schedule import FREE_SECONDS, At, Budget, Schedule
from fimprobe.training.shared_budget import SharedBudget
from fimprobe.training.unseen_steps import NEVER_STEPPED, UNSEEN_STEPS, UnseenSteps

STEPS_FOR_TWO_REPORTS = 10
"""Steps from which on a single report under a time budget is explained."""


def write_conclusion(
    account: RunAccount,
    sinks: SinkGroup,
    errors: ErrorHandler,
    *,
    config: Config,
    schedule: Schedule,
    reader: BatchReader,
    unseen: UnseenSteps | None,
    steps: int,
    log_dir: Path | None,
) -> None:
    """State what was measured, or why nothing was; write why probing ended.

    Args:
        account: The reports, batches and seconds of the run.
        sinks: Hold the reports; those that record the end receive its reason.
        errors: Knows why probing ended before the training, and logs why nothing was measured.
        config: The options.
        schedule: Decided which steps were due.
        reader: Knows the likelihood, or why it is not known.
        unseen: Knows the forward passes of a loop without steps; None for loops with steps.
        steps: Number of the step after the last one.
        log_dir: The folder of the charts; None without one.
    """
    reports, reason = sinks.memory.reports, errors.end_reason
    if reports:
        paragraph = closing_paragraph(
            account, reports, config, schedule=schedule, steps=steps, reason=reason
        )
        place = config.jsonl or (log_dir if config.jsonl is None else None)
        show = f" To read them: fimprobe show {shlex.quote(str(place))}" if place else ""
        announce(f"{paragraph}{show}")
    else:
        first_step = account.first_step
        # these are as requested, or were logged as a warning when they occurred
        reason = reason or account.why_skipped or why_nothing_was_due(schedule, first_step, steps)
        if reason:
            announce(f"no report in {count_steps(steps - first_step)}: {reason.rstrip('.')}.")
        else:
            reason = _why_nothing_was_measured(account, reader, unseen)
            if reason:
                errors.warn_once(reason)
    if reason:
        sinks.write_end(reason, steps)


def _why_nothing_was_measured(
    account: RunAccount, reader: BatchReader, unseen: UnseenSteps | None
) -> str:
    """Return the reason where no warning stated it; "" if nothing happened."""
    if unseen is not None and unseen.forwards >= UNSEEN_STEPS:
        return NEVER_STEPPED.format(forwards=unseen.forwards)
    if reader.likelihood is None and account.num_batches and reader.undecided:
        return (
            f"nothing was measured: likelihood='auto' is not decided after {account.num_batches} "
            f"training batches, because {reader.undecided}"
        )
    return ""


def count_steps(steps: int) -> str:
    """Return an exact number of steps in words.

    >>> count_steps(1), count_steps(123456)
    ('1 step', '123,456 steps')
    """
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def why_nothing_was_due(schedule: Schedule, first_step: int, steps: int) -> str:
    """Return why no step of a training was due; "" if some were, or if there was none.

    Args:
        schedule: Decided it.
        first_step: Number of the first step.
        steps: Number of the step after the last one.
    """
    if steps <= first_step:
        return ""
    if isinstance(schedule, At) and not any(first_step <= step < steps for step in schedule.at):
        return (
            f"the schedule names none of the steps {first_step:,} to {steps - 1:,}. "
            'Use schedule={"every": 100}, or steps that the training makes'
        )
    if isinstance(schedule, (Budget, SharedBudget)) and steps - first_step == 1:
        return (
            'the training made one step, and a budget begins at the second. Use schedule={"every": 1}'
        )
    return ""


def closing_paragraph(
    account: RunAccount,
    written: Sequence[Report],
    config: Config,
    *,
    schedule: Schedule,
    steps: int,
    reason: str,
) -> str:
    """Return the paragraph that ends a training with reports.

    Args:
        account: The reports and seconds of the run.
        written: The newest reports, at least one.
        config: The options.
        schedule: Decided which steps were due.
        steps: Number of the step after the last one.
        reason: Why probing ended before the training; "" if it did not.
    """
    reports, last = quantity(account.num_reports, "report"), written[-1]
    trained = steps - account.first_step
    sentences = [
        f"{reports} in {count_steps(trained)}, the last at step {last.step:,}.",
        *last.advice[:1],
    ]
    if reason:
        sentences.append(f"{reason[0].upper()}{reason[1:].rstrip('.')}.")
    is_single = account.num_reports == 1 and trained >= STEPS_FOR_TWO_REPORTS and not reason
    missing = _what_is_missing(written, config, account)
    if missing:
        sentences.append(missing)
    elif is_single and isinstance(schedule, (Budget, SharedBudget)):
        sentences.append(
            "A second report did not fit into the time budget: pass schedule={'every': 100}, or "
            "train longer."
        )
    sentences.append(_what_it_took(account, schedule))
    return " ".join(sentences)


def _what_it_took(account: RunAccount, schedule: Schedule) -> str:
    """Return the seconds of the probe, and what they were for."""
    seconds, share = account.probe_seconds, percent(account.probe_seconds / account.wall_seconds)
    took = f"The probe took {_seconds(seconds)} of {_seconds(account.wall_seconds)} ({share})"
    if isinstance(schedule, Budget) and schedule.free:
        took += (
            f": {_seconds(schedule.free)} of early reports, which have {FREE_SECONDS:g} s of their "
            f"own; all others may take {percent(schedule.budget)} of the time"
        )
    others = seconds - account.report_seconds
    if account.report_seconds and others >= 0.1 * seconds:
        took += (
            f". Measurements took {_seconds(account.report_seconds)}, files, pictures and imports "
            f"{_seconds(others)}"
        )
    return f"{took}."


def _what_is_missing(written: Sequence[Report], config: Config, account: RunAccount) -> str:
    """Return what the reports lack, why, and the setting that would measure it."""
    last = written[-1]
    if is_partial(last.notes):
        return _what_did_not_fit(written, config, account)
    if "empirical" in config.estimators and last.total.empirical is None:
        return (
            "Not measured: the empirical Fisher, because the labels of the data are not known. Pass "
            "labels= a function from the forward's (args, kwargs) to them."
        )
    if "i2" in config.estimators and last.total.i2 is None and config.second_order != "off":
        return next((note for note in last.notes if note.startswith("Î₂")), "")
    if "more inputs" in last.total.i1.unknown.get("rel_error", ""):
        family = f"likelihood={last.likelihood!r}" if last.likelihood.isalpha() else "likelihood=..."
        return (
            f"To know the error, measure more inputs than the {last.batch_size:,} of a report: "
            f"fimprobe.measure(model, inputs, {family})."
        )
    return ""


def _what_did_not_fit(written: Sequence[Report], config: Config, account: RunAccount) -> str:
    """Return what a run under a time budget did not measure, or when it last did."""
    with_i2 = [report.step for report in written if report.total.i2 is not None]
    with_bounds = not all(is_partial(report.notes) for report in written)
    parts = [
        *(["Î₂"] if "i2" in config.estimators and not with_i2 else []),
        *(["the bounds"] if config.bounds and not with_bounds else []),
    ]
    sentences = []
    if with_i2 and with_i2[-1] < written[-1].step:
        sentences.append(f"The last report with Î₂ is that of step {with_i2[-1]:,}.")
    if parts:
        sentences.append(
            f"Not measured: {' and '.join(parts)}, because a report with them did not fit into the "
            f"time budget of {_seconds(account.wall_seconds)} of training. Pass "
            "schedule={'every': 100}, or train longer, to measure them."
        )
    return " ".join(sentences)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:,.0f} s"
