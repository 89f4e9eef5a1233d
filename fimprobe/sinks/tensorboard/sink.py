"""The sink that writes charts, histograms, figures and text for TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import ESTIMATOR_DESCRIPTIONS, KEYS
from fimprobe.plots.history import PlotHistory
from fimprobe.report.layer_names import label_layers
from fimprobe.report.partial_reports import is_preview
from fimprobe.report.report import Report, shared_record
from fimprobe.sinks.folder_lock import FolderLock
from fimprobe.sinks.tensorboard.event_file import EventFile, first_tags
from fimprobe.sinks.tensorboard.tags import (
    LAYER_ERRORS,
    LAYER_TRACES,
    MAIN_RUN,
    describe,
    make_histograms,
    make_scalars,
)
from fimprobe.sinks.tensorboard.text_pages import about_page, advice_page
from fimprobe.training.schedule import Schedule

logger = logging.getLogger("fimprobe")

MAX_DENSE_REPORTS = 10_000
"""Reports whose scalars are all written; see ``is_written``."""

MAX_DENSE_PAGES = 200
"""Reports whose text and histograms are all written: TensorBoard shows a few hundred at most."""

FIRST_DRAWING_SECONDS = 0.5
"""Expected time of the first figures, with the import of matplotlib."""


def is_written(number: int, dense: int) -> bool:
    """Return whether a report is written.

    All of the first ``dense`` reports are, then every second until 2 ``dense``, every fourth until
    4 ``dense``, and so on.

    Args:
        number: The number of the report: 1, 2, ...
        dense: Number of reports that are all written.

    >>> [n for n in range(1, 20) if is_written(n, 4)]
    [1, 2, 3, 4, 6, 8, 12, 16]
    """
    stride = 1
    while number > dense * stride:
        stride *= 2
    return number % stride == 0


class TensorboardSink:
    """Writer of a run for each estimator, in folders below ``log_dir``, and of what they share.

    All estimators have the same tags, so that every chart of TensorBoard overlays them. Layers are in
    pictures and histograms; ``top`` of them have charts of their own. These are the layers that need
    the most pairs for 10 % at the first report, and they stay. Scalars are written at every report up
    to 10,000, then less and less often (``is_written``); text and histograms likewise from 200 on.
    Two figures are drawn at reports 4, 8, 16, ..., or later when the budget of the schedule allows.
    ``close`` draws all of them and completes the last report.
    Therefore n > 10,000 reports take at most 10,000 · (1 + log₂(n / 10,000)) records.

    Args:
        log_dir: The folder of the event file.
        top: Number of layers with charts of their own.
        include: Patterns of the names of these layers; None for all.
        exclude: Patterns of layers without charts.
        run: Function that returns the information on the run (``collect_run_info``).
        histograms: Whether to write histograms.
        figures: Whether to draw figures.
        schedule: The schedule whose budget figures are charged to.
        overhead: Function that returns the share of the wall time that the probe took so far; None
            where it is not known yet.
        purge_step: The step at which a training resumes; None for a new one. Readers drop the
            folder's records of this step and later ones, and the layers stay those of before. A sink
            that this process left open in the folder is closed.

    Raises:
        FimprobeError: If another probe writes to the folder.
    """

    def __init__(
        self,
        log_dir: str | Path,
        *,
        top: int = 0,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        run: Callable[[], dict[str, Any]] = dict,
        histograms: bool = True,
        figures: bool = True,
        schedule: Schedule | None = None,
        overhead: Callable[[], float | None] = lambda: None,
        purge_step: int | None = None,
    ) -> None:
        folder = Path(log_dir)
        self._lock = FolderLock(folder, take_over=purge_step is not None)
        self._folder, self._purge_step = folder, purge_step
        self._files: dict[str, EventFile] = {}
        try:
            self._charted = None if purge_step is None else _charted_labels(folder)
            self._open_file(MAIN_RUN)
            for key in KEYS:
                if purge_step is not None and (folder / key).is_dir():
                    self._open_file(key)
        except BaseException:
            self._close_files()
            raise
        self.layers: list[str] | None = None
        self.top, self.include, self.exclude = top, include or ["*"], exclude or []
        self.histograms = histograms
        self._run, self._overhead = run, overhead
        self._history = PlotHistory() if figures and _has_matplotlib() else None
        self._schedule = schedule or Schedule()
        self._drawing_seconds = FIRST_DRAWING_SECONDS
        self._figures_postponed = False
        self._figures = figures
        self._drawn: set[str] = set()
        """The figures of the last report that are in the file."""
        self._described: set[str] = set()
        """The estimators on the newest page on the run."""
        self._count = 0
        self._omitted: list[Callable[[Report], None]] = []
        """The methods that add to the file what the last report left out."""
        self._last: Report | None = None
        self._record: dict[str, Any] = {}  # of the last report
        self._whole: dict[str, Any] | None = None  # of the last report that is no preview
        self._closed = False

    def write(self, report: Report) -> None:
        """Write one report and flush the file.

        Raises:
            FimprobeError: If a resumed training writes to the folder now.
        """
        if not self._lock.held:
            raise FimprobeError("a resumed training writes to this folder now")
        self._last, self._record, self._omitted = report, shared_record(report), []
        if self._history is not None and not is_preview(report.notes):
            self._whole = self._record
        self._drawn.clear()
        if self.layers is None:
            self.layers = self._select_layers(report)
        self._count += 1
        measured: set[str] = {key for key in KEYS if key in self._record["total"]}
        if not measured <= self._described:  # the first report may be a preview without Î₂
            self._described = measured
            self._files[MAIN_RUN].add_text("fimprobe/about", self._about(report))
        if self._history is not None:
            self._history.remember(self._record)
        for due, add in (
            (is_written(self._count, MAX_DENSE_REPORTS), self._add_scalars),
            (is_written(self._count, MAX_DENSE_PAGES), self._add_pages),
            (self._figures_due(), self._add_figures),
        ):
            if due:
                add(report)
            else:
                self._omitted.append(add)
        self._write_files(report.step)

    def write_end(self, reason: str, step: int) -> None:
        """Write why probing ended before the training, or never began, as a page.

        Args:
            reason: In words.
            step: Number of the step after the last one.
        """
        if self._lock.held:
            self._files[MAIN_RUN].add_text("fimprobe/ended", reason)
            self._files[MAIN_RUN].write(step)

    def close(self) -> None:
        """Complete the last report, close the event file and release the folder."""
        omitted, self._omitted = self._omitted, []
        self._closed = True
        try:
            if self._last is not None and omitted and self._lock.held:
                for add in omitted:
                    add(self._last)
                self._write_files(self._last.step)
        finally:
            self._close_files()

    def _open_file(self, run: str) -> EventFile:
        """Return the event file of a run, opened if it is not yet.

        Args:
            run: The key of an estimator, or ``MAIN_RUN``.
        """
        folder = self._folder / run
        if run not in self._files:
            if run and folder.is_symlink():  # its target is not ours to write
                raise FimprobeError(
                    "`log_dir` must be a folder without links in place of fimprobe's files, but "
                    f"{str(folder)!r} is a link. Remove it, or pass another folder."
                )
            of_estimator = f"{ESTIMATOR_DESCRIPTIONS[run]} " if run else ""
            self._files[run] = EventFile(
                folder, lambda tag: of_estimator + describe(tag), purge_step=self._purge_step
            )
        return self._files[run]

    def _write_files(self, step: int) -> None:
        for file in self._files.values():
            file.write(step)

    def _close_files(self) -> None:
        """Close all files, also if one of them cannot be closed, and release the folder."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._lock.release)
            for file in self._files.values():
                stack.callback(file.close)

    def _add_scalars(self, report: Report) -> None:
        assert self.layers is not None
        runs = make_scalars(report, self._record, self.layers)
        overhead = self._overhead()
        if overhead is not None:
            runs[MAIN_RUN]["fim_probe/overhead"] = overhead
        for run, values in runs.items():
            for tag, value in values.items():
                self._open_file(run).add_scalar(tag, value)

    def _add_pages(self, report: Report) -> None:
        self._files[MAIN_RUN].add_text("fimprobe/advice", advice_page(self._record))
        if self.histograms:
            for run, tag, values, weights in make_histograms(report, self._record):
                self._open_file(run).add_histogram(tag, values, weights)

    def _figures_due(self) -> bool:
        """Return whether this is report 4, 8, 16, ..., or figures were postponed."""
        return self._figures_postponed or (self._count >= 4 and self._count.bit_count() == 1)

    def _add_figures(self, report: Report) -> None:
        if self._history is None:
            return
        # the last pictures are drawn at any cost: a run without them leaves its layers unseen
        self._figures_postponed = not (
            self._closed or self._schedule.can_afford(self._drawing_seconds)
        )
        if not self._closed:
            self._omitted.append(self._add_figures)
        if self._figures_postponed:
            return
        started = time.perf_counter()
        try:
            from fimprobe.plots.gallery import DURING_TRAINING, make_figures
            from fimprobe.plots.style import to_png
        except ImportError as error:
            _warn_of_missing(error.name)
            self._history = None
            return
        names = None if self._closed else DURING_TRAINING
        earlier = self._whole if is_preview(report.notes) else None
        for entry in make_figures(self._history.records, self._record, earlier=earlier, names=names):
            if entry.name in self._drawn:
                continue
            self._drawn.add(entry.name)
            png, size = to_png(entry.figure, entry.title)
            self._files[MAIN_RUN].add_image(f"fim_pictures/{entry.name}", png, size)
        self._drawing_seconds = time.perf_counter() - started
        self._schedule.charge(self._drawing_seconds)

    def _about(self, report: Report) -> str:
        pictures = (
            "IMAGES: traces and layers at reports 4, 8, 16, ..., where a budget has room; all others "
            "at the end."
        )
        if self._history is None:
            reason = "matplotlib is missing" if self._figures else "figures: false"
            pictures = f"No pictures: {reason}."
        histograms = "HISTOGRAMS: errors and sizes over all parameters." if self.histograms else ""
        return about_page(report, run=self._run(), tabs=f"{pictures} {histograms}".strip())

    def _select_layers(self, report: Report) -> list[str]:
        """Return the layers with charts: those that need the most pairs, in the model's order."""
        if self._charted is not None:  # those of before
            labels = label_layers(self._record)
            return [name for name, label in labels.items() if label in self._charted]
        pairs = {
            name: group.i1.pairs_for(0.1) or 0.0
            for name, group in report.layers.items()
            if any(fnmatchcase(name, pattern) for pattern in self.include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }
        selected = set(sorted(pairs, key=lambda name: -pairs[name])[: self.top])
        return [name for name in pairs if name in selected]


def _charted_labels(log_dir: Path) -> set[str] | None:
    """Return the labels of the layers with charts in a folder; None without any report."""
    tags = first_tags(log_dir / "i1", "fim/")
    if tags is None:
        return None
    starts = (LAYER_ERRORS, LAYER_TRACES)
    return {tag.partition("/")[2] for tag in tags if tag.startswith(starts)}


def _has_matplotlib() -> bool:
    """Return whether matplotlib is installed, without the import, which the first figures pay for."""
    installed = importlib.util.find_spec("matplotlib") is not None
    if not installed:
        _warn_of_missing("matplotlib")
    return installed


def _warn_of_missing(name: str | None) -> None:
    logger.warning(
        "fimprobe: no pictures in TensorBoard, because %s cannot be imported; run pip install "
        "'fimprobe[plots]', or pass tensorboard={'figures': False}",
        name or "matplotlib",
    )
