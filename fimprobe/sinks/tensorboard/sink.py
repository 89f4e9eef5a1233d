"""The sink that writes charts, histograms, figures and text for TensorBoard."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.plots.history import PlotHistory
from fimprobe.report.report import Report
from fimprobe.sinks.folder_lock import FolderLock
from fimprobe.sinks.tensorboard.dashboard import MAX_BAND_CHARTS, Category, make_dashboard
from fimprobe.sinks.tensorboard.event_file import EventFile, first_tags
from fimprobe.sinks.tensorboard.tags import describe, make_histograms, make_scalars
from fimprobe.sinks.tensorboard.text_pages import about_page, advice_page
from fimprobe.training.schedule import Schedule

logger = logging.getLogger("fimprobe")

MAX_DENSE_REPORTS = 10_000
"""Reports whose scalars are all written; see ``is_written``."""

MAX_DENSE_PAGES = 200
"""Reports whose text and histograms are all written: TensorBoard shows a few hundred at most."""

FIRST_DRAWING_SECONDS = 1.0
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
    """Writer of ``fim/i1/*`` for the model and ``fim_layers/<layer>/i1_*`` for selected layers.

    The layers that need the most pairs for 10 % are selected at the first report and stay. Scalars
    are written at every report up to 10,000, then less and less often (``is_written``); text and
    histograms likewise from 200 on. Figures take about a second; they are drawn at reports 4, 8,
    16, ..., or later when the budget of the schedule allows. ``close`` completes the last report.
    Therefore n > 10,000 reports take at most 10,000 · (1 + log₂(n / 10,000)) records.

    Args:
        log_dir: The folder of the event file.
        top: Number of layers with charts.
        include: Patterns of the names of these layers; None for all.
        exclude: Patterns of layers without charts.
        run: Function that returns the information on the run (``collect_run_info``).
        histograms: Whether to write histograms.
        figures: Whether to draw figures.
        schedule: The schedule whose budget figures are charged to.
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
        top: int = 12,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        run: Callable[[], dict[str, Any]] = dict,
        histograms: bool = True,
        figures: bool = True,
        schedule: Schedule | None = None,
        purge_step: int | None = None,
    ) -> None:
        folder = Path(log_dir)
        self._lock = FolderLock(folder, take_over=purge_step is not None)
        try:
            self.layers = None if purge_step is None else _charted_layers(folder)
            self.file = EventFile(folder, describe, purge_step=purge_step)
        except BaseException:
            self._lock.release()
            raise
        self.top, self.include, self.exclude = top, include or ["*"], exclude or []
        self.histograms = histograms
        self._run = run
        self._history = PlotHistory() if figures and _has_matplotlib() else None
        self._schedule = schedule or Schedule()
        self._drawing_seconds = FIRST_DRAWING_SECONDS
        self._figures_postponed = False
        self._figures = figures
        self._tags: set[str] = set()
        self._dashboard: list[Category] = []
        self._count = 0
        self._started, self._spent_seconds = time.perf_counter(), 0.0
        self._omitted: list[Callable[[Report], None]] = []
        """The methods that add to the file what the last report left out."""
        self._last: Report | None = None
        self._record: dict[str, Any] = {}  # of the last report
        self._closed = False

    def write(self, report: Report) -> None:
        """Write one report and flush the file.

        Raises:
            FimprobeError: If a resumed training writes to the folder now.
        """
        started = time.perf_counter()
        if not self._lock.held:
            raise FimprobeError("a resumed training writes to this folder now")
        if self.layers is None:
            self.layers = self._select_layers(report)
        self._count += 1
        if self._count == 1:
            self.file.add_text("fimprobe/about", self._about(report))
        self._last, self._record, self._omitted = report, report.to_dict(), []
        if self._history is not None:
            self._history.remember(self._record)
        self._spent_seconds += report.seconds
        for due, add in (
            (is_written(self._count, MAX_DENSE_REPORTS), self._add_scalars),
            (is_written(self._count, MAX_DENSE_PAGES), self._add_pages),
            (self._figures_due(), self._add_figures),
        ):
            if due:
                add(report)
            else:
                self._omitted.append(add)
        self.file.write(report.step)
        self._spent_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Complete the last report, close the event file and release the folder."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._last is not None and self._omitted and self._lock.held:
                for add in self._omitted:
                    add(self._last)
                self.file.write(self._last.step)
        finally:
            try:
                self.file.close()
            finally:
                self._lock.release()

    def _add_scalars(self, report: Report) -> None:
        assert self.layers is not None
        # up to three bands of the whole model, two of each layer
        values = make_scalars(report, self.layers, self.layers[: (MAX_BAND_CHARTS - 3) // 2])
        wall_seconds = max(time.perf_counter() - self._started, self._spent_seconds)
        overhead = self._spent_seconds / wall_seconds if wall_seconds > 0 else 0.0
        values["fim_probe/overhead"] = overhead
        for tag, value in values.items():
            self.file.add_scalar(tag, value)
        if not values.keys() <= self._tags:
            self._tags |= values.keys()
            dashboard = make_dashboard(self._tags, self.layers)
            if dashboard != self._dashboard:
                self._dashboard = dashboard
                self.file.add_layout(dashboard)

    def _add_pages(self, report: Report) -> None:
        self.file.add_text("fimprobe/advice", advice_page(self._record))
        if self.histograms:
            for tag, values, weights in make_histograms(report):
                self.file.add_histogram(tag, values, weights)

    def _figures_due(self) -> bool:
        """Return whether this is report 4, 8, 16, ..., or figures were postponed."""
        return self._figures_postponed or (self._count >= 4 and self._count.bit_count() == 1)

    def _add_figures(self, report: Report) -> None:
        if self._history is None:
            return
        self._figures_postponed = not self._schedule.can_afford(self._drawing_seconds)
        if self._figures_postponed:
            if not self._closed:
                self._omitted.append(self._add_figures)
            return
        started = time.perf_counter()
        try:
            from fimprobe.plots.gallery import OVER_STEPS, make_figures
            from fimprobe.plots.style import to_png
        except ImportError as error:
            _warn_of_missing(error.name)
            self._history = None
            return
        for entry in make_figures(self._history.records, self._record, without=OVER_STEPS):
            png, size = to_png(entry.figure, entry.title)
            self.file.add_image(f"fim_pictures/{entry.name}", png, size)
        self._drawing_seconds = time.perf_counter() - started
        self._schedule.charge(self._drawing_seconds)

    def _about(self, report: Report) -> str:
        pictures = (
            "Pictures are drawn at reports 4, 8, 16, ... and the last, where a budget has room."
        )
        if self._history is None:
            reason = "matplotlib is missing" if self._figures else "figures: false"
            pictures = f"No pictures: {reason}."
        return about_page(report, run=self._run(), layers=self.layers or [], pictures=pictures)

    def _select_layers(self, report: Report) -> list[str]:
        """Return the layers that need the most pairs, in the order of the model."""
        pairs = {
            name: group.i1.pairs_for(0.1) or 0.0
            for name, group in report.layers.items()
            if any(fnmatchcase(name, pattern) for pattern in self.include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }
        selected = set(sorted(pairs, key=lambda name: -pairs[name])[: self.top])
        return [name for name in pairs if name in selected]


def _charted_layers(log_dir: Path) -> list[str] | None:
    """Return the layers of the first report in a folder; None without any report."""
    tags = first_tags(log_dir, "fim/")
    if tags is None:
        return None
    names = (tag.split("/", 1)[1] for tag in tags if tag.startswith("fim_layers/"))
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in names))


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
