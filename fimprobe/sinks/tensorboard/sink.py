"""Charts, histograms, pictures and text for TensorBoard."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.estimators.estimate import GroupEstimates
from fimprobe.plots.history import PlotHistory
from fimprobe.report.report import Report
from fimprobe.sinks.folder_lock import FolderLock
from fimprobe.sinks.tensorboard.dashboard import MOST_MARGINS, Category, make_dashboard
from fimprobe.sinks.tensorboard.event_file import EventFile, first_tags
from fimprobe.sinks.tensorboard.tags import describe, make_scalars, make_spreads
from fimprobe.sinks.tensorboard.text_pages import about_page, advice_page
from fimprobe.training.schedule import Schedule

logger = logging.getLogger("fimprobe")

MAX_DENSE_REPORTS = 10_000
"""Reports written one by one; see ``is_written``."""

DRAWING = 1.0
"""Seconds that pictures are expected to take the first time, with the import of matplotlib."""

DENSE_PAGES = 200
"""The same for text and histograms, of which TensorBoard shows a few hundred at most."""


def is_written(number: int, dense: int) -> bool:
    """Whether the report of this number (1, 2, ...) is written: all of the first ``dense``, then
    every second until 2 ``dense``, every fourth until 4 ``dense``, and so on.

    >>> [n for n in range(1, 20) if is_kept(n, 4)]
    [1, 2, 3, 4, 6, 8, 12, 16]
    """
    stride = 1
    while number > dense * stride:
        stride *= 2
    return number % stride == 0


class TensorboardSink:
    """Writes ``fim/i1/*`` for the model, ``fim_layers/<layer>/i1_*`` for the layers that need most.

    The layers are chosen at the first report, by the pairs that 10 % takes, and kept. Scalars come
    at every report up to 10,000, then ever more thinly (``is_written``); text and histograms do so
    from 200 on; pictures, about a second each time, come at reports 4, 8, 16, ... What is left out is
    written for the last report by ``close``. So n reports, more than 10,000, take no more than
    10,000 · (1 + log₂(n / 10,000)) records. Pictures for which the ``schedule``'s budget has no room
    wait for a later report.

    ``run`` tells what is measured and how (``collect_run_info``). ``purge_step``: where a training
    resumes; readers drop what the folder holds of this step and later ones, and the layers are those
    charted before; a sink of this process that was left open there ends. Otherwise raises
    :class:`FimprobeError` where another probe writes to the folder.
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
            self.layers = None if purge_step is None else _charted(folder)
            self.file = EventFile(folder, describe, purge_step=purge_step)
        except BaseException:
            self._lock.release()
            raise
        self.top, self.include, self.exclude = top, include or ["*"], exclude or []
        self.histograms = histograms
        self._run = run
        self._album = PlotHistory() if figures and _has_matplotlib() else None
        self._schedule, self._drawing = schedule or Schedule(), DRAWING
        self._pictures_wait = False
        self._figures = figures
        self._tags: set[str] = set()
        self._dashboard: list[Category] = []
        self._count = 0
        self._began, self._spent = time.perf_counter(), 0.0
        self._left: list[Callable[[Report], None]] = []
        self._last: Report | None = None
        self._record: dict[str, Any] = {}  # the last report's
        self._closed = False

    def write(self, report: Report) -> None:
        """Write one report; it is in the file when this returns."""
        started = time.perf_counter()
        if not self._lock.held:
            raise FimprobeError("a resumed training has taken over this folder")
        if self.layers is None:
            self.layers = self._choose(report)
        self._count += 1
        if self._count == 1:
            self.file.add_text("fimprobe/about", self._about(report))
        self._last, self._record, self._left = report, report.to_dict(), []
        if self._album is not None:
            self._album.remember(self._record)
        self._spent += report.seconds
        for due, add in (
            (is_written(self._count, MAX_DENSE_REPORTS), self._add_scalars),
            (is_written(self._count, DENSE_PAGES), self._add_pages),
            (self._wants_pictures(), self._add_pictures),
        ):
            if due:
                add(report)
            else:
                self._left.append(add)
        self.file.write(report.step)
        self._spent += time.perf_counter() - started

    def close(self) -> None:
        """Write what the last report lacks, close the event file, let go of the folder."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._last is not None and self._left and self._lock.held:
                for add in self._left:
                    add(self._last)
                self.file.write(self._last.step)
        finally:
            self.file.close()
            self._lock.release()

    def _add_scalars(self, report: Report) -> None:
        assert self.layers is not None
        # three kinds of the model's bands, two of each layer's
        values = make_scalars(report, self.layers, self.layers[: (MOST_MARGINS - 3) // 2])
        wall = max(time.perf_counter() - self._began, self._spent)
        values["fim_probe/overhead"] = self._spent / wall if wall > 0 else 0.0
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
            for tag, values, weights in make_spreads(report):
                self.file.add_histogram(tag, values, weights)

    def _wants_pictures(self) -> bool:
        return self._pictures_wait or (self._count >= 4 and self._count.bit_count() == 1)

    def _add_pictures(self, report: Report) -> None:
        if self._album is None:
            return
        self._pictures_wait = not self._schedule.can_afford(self._drawing)
        if self._pictures_wait:
            if not self._closed:
                self._left.append(self._add_pictures)
            return
        started = time.perf_counter()
        try:
            from fimprobe.plots.gallery import OVER_STEPS, make_figures
            from fimprobe.plots.style import to_png
        except ImportError as error:
            _tell_missing(error.name)
            self._album = None
            return
        for picture in make_figures(self._album.records, self._record, without=OVER_STEPS):
            png, size = to_png(picture.figure, picture.title)
            self.file.add_image(f"fim_pictures/{picture.name}", png, size)
        self._drawing = time.perf_counter() - started
        self._schedule.charge(self._drawing)

    def _about(self, report: Report) -> str:
        pictures = (
            "Pictures are drawn at reports 4, 8, 16, ... and the last, where a budget has room."
        )
        if self._album is None:
            why = "matplotlib is missing" if self._figures else "figures: false"
            pictures = f"No pictures: {why}."
        return about_page(
            report,
            run=self._run(),
            layers=self.layers or [],
            pictures=pictures,
        )

    def _choose(self, report: Report) -> list[str]:
        def need(item: tuple[str, GroupEstimates]) -> float:
            return -(item[1].i1.pairs_for(0.1) or 0.0)

        wanted = [
            (name, group)
            for name, group in report.layers.items()
            if any(fnmatchcase(name, p) for p in self.include)
            and not any(fnmatchcase(name, p) for p in self.exclude)
        ]
        chosen = {name for name, _ in sorted(wanted, key=need)[: self.top]}
        return [name for name, _ in wanted if name in chosen]


def _charted(log_dir: Path) -> list[str] | None:
    """The layers of the first report in a folder; None where it holds none."""
    tags = first_tags(log_dir, "fim/")
    if tags is None:
        return None
    names = (tag.split("/", 1)[1] for tag in tags if tag.startswith("fim_layers/"))
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in names))


def _has_matplotlib() -> bool:
    """Whether it is installed; it is imported when the first pictures are drawn."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        _tell_missing("matplotlib")
    return found


def _tell_missing(name: str | None) -> None:
    logger.warning(
        "fimprobe: no pictures in TensorBoard, since %s cannot be imported; pip install "
        "'fimprobe[plots]', or pass tensorboard={'figures': False}",
        name or "matplotlib",
    )
