"""What a probe states when its training ends: what was measured, what was not, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fimprobe.config.config import Config
from fimprobe.probe.step_measurement import PREVIEW_NOTE
from fimprobe.report.format import percent, quantity
from fimprobe.report.report import Report
from fimprobe.training.schedule import At, Budget, Schedule, SharedBudget

MIN_WALL_SECONDS = 30.0
"""Wall time from which on the share of the probe in it is stated: before, it is that of a start."""


@dataclass(kw_only=True)
class RunAccount:
    """The reports and the seconds of one run.

    Attributes:
        first_step: Number of the first step.
        began: Time at which the probe was attached.
        num_reports: Reports so far.
        probe_seconds: Seconds that measurements and their files took.
        why_skipped: Why the last step that was due has no report; "" where none was skipped.
    """

    first_step: int = 0
    began: float = field(default_factory=time.perf_counter)
    num_reports: int = 0
    probe_seconds: float = 0.0
    why_skipped: str = ""

    @property
    def wall_seconds(self) -> float:
        """Seconds since the probe was attached."""
        return max(time.perf_counter() - self.began, self.probe_seconds)

    @property
    def overhead(self) -> float | None:
        """The share of the wall time that the probe took so far; None in the first 30 s."""
        wall_seconds = self.wall_seconds
        return self.probe_seconds / wall_seconds if wall_seconds >= MIN_WALL_SECONDS else None


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
    account: RunAccount, last: Report, config: Config, *, steps: int, reason: str
) -> str:
    """Return the paragraph that ends a training with reports.

    Args:
        account: The reports and seconds of the run.
        last: The newest report.
        config: The options.
        steps: Number of the step after the last one.
        reason: Why probing ended before the training; "" if it did not.
    """
    reports = quantity(account.num_reports, "report")
    sentences = [
        f"{reports} in {count_steps(steps - account.first_step)}, the last at step {last.step:,}.",
        *last.advice[:1],
    ]
    if reason:
        sentences.append(f"{reason[0].upper()}{reason[1:].rstrip('.')}.")
    missing = _what_is_missing(last, config, account)
    if missing:
        sentences.append(missing)
    share = account.probe_seconds / account.wall_seconds
    sentences.append(
        f"The probe took {_seconds(account.probe_seconds)} of {_seconds(account.wall_seconds)} "
        f"({percent(share)})."
    )
    return " ".join(sentences)


def _what_is_missing(last: Report, config: Config, account: RunAccount) -> str:
    """Return what the last report lacks, why, and the setting that would measure it."""
    if PREVIEW_NOTE in last.notes:
        trained = _seconds(account.wall_seconds)
        return (
            "Not measured: Î₂ and the bounds, because a whole report did not fit into the time "
            f"budget of {trained} of training. Pass schedule={{'every': 100}}, or train longer, to "
            "measure them."
        )
    if "empirical" in config.estimators and last.total.empirical is None:
        return (
            "Not measured: the empirical Fisher, because the labels of the data are not known. Pass "
            "labels= a function from the forward's (args, kwargs) to them."
        )
    if "i2" in config.estimators and last.total.i2 is None and config.second_order != "off":
        return next((note for note in last.notes if note.startswith("Î₂")), "")
    return ""


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:,.0f} s"
