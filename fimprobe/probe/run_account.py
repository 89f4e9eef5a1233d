"""The account of one run: its reports, batches and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

MIN_WALL_SECONDS = 30.0
"""Wall time from which on the share of the probe in it is stated: before, it is that of a start."""

STEPS_WITHOUT_BATCH = 3
"""Optimizer steps without any captured batch after which the probe warns."""


@dataclass(kw_only=True)
class RunAccount:
    """The reports, batches and seconds of one run.

    Attributes:
        first_step: Number of the first step.
        began: Time at which the probe was attached.
        num_reports: Reports so far.
        num_batches: Steps so far that had a batch.
        num_missing: Steps so far that had none.
        probe_seconds: Seconds that measurements and their files took.
        report_seconds: Those of the reports alone, without files, pictures and imports.
        measuring_since: Time at which the measurement that runs now began; None between two.
        last_end: Time at which the probe was ready for the loop to continue.
        coverage: How the last report measured each parameter, or why it did not.
        why_skipped: Why the last step that was due has no report; "" where none was skipped.
    """

    first_step: int = 0
    began: float = field(default_factory=time.perf_counter)
    num_reports: int = 0
    num_batches: int = 0
    num_missing: int = 0
    probe_seconds: float = 0.0
    report_seconds: float = 0.0
    measuring_since: float | None = None
    last_end: float = field(default_factory=time.perf_counter)
    coverage: dict[str, str] = field(default_factory=dict)
    why_skipped: str = ""

    @property
    def wall_seconds(self) -> float:
        """Seconds since the probe was attached."""
        return max(time.perf_counter() - self.began, self.probe_seconds)

    @property
    def overhead(self) -> float | None:
        """The share of the wall time that the probe took so far; None in the first 30 s."""
        now, seconds = time.perf_counter(), self.probe_seconds
        if self.measuring_since is not None:
            seconds += now - self.measuring_since
        wall_seconds = max(now - self.began, seconds)
        return seconds / wall_seconds if wall_seconds >= MIN_WALL_SECONDS else None

    def observe_step(self, started: float, *, measured: bool) -> tuple[float, float]:
        """Add the time of one step.

        Args:
            started: Time at which the probe's part of it began.
            measured: Whether that part counts as time of the probe.

        Returns:
            The seconds of the training loop before it, and those of the probe.
        """
        ended = time.perf_counter()
        probe_seconds = ended - started if measured else 0.0
        loop_seconds = max(started - self.last_end, 0.0)
        self.probe_seconds += probe_seconds
        self.last_end = ended
        return loop_seconds, probe_seconds

    def add_missing_batch(self, *, num_evaluations: int) -> str:
        """Count a step without a batch.

        Args:
            num_evaluations: Forward passes in eval mode so far.

        Returns:
            At the third such step, why no step had a batch; "" at others, or if one had.
        """
        self.num_missing += 1
        if self.num_missing != STEPS_WITHOUT_BATCH or self.num_batches:
            return ""
        cause = (
            "its forward passes ran in eval mode; call model.train() while training"
            if num_evaluations
            else "no forward pass of the attached object was seen, as none is where a whole training "
            "step is compiled; attach to the object that the loop calls, after torch.compile and "
            "other wrappers"
        )
        return (
            f"the optimizer steps, but no training batch was captured: {cause}, or call "
            "probe.step(inputs) yourself"
        )
