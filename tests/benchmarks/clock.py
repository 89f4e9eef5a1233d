"""Times of several contenders, interleaved with the unit in one process."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

SLOW = 2.0
"""Seconds above which a row is timed in fewer rounds."""


class Ratio(NamedTuple):
    """Time over the unit's: median, quartiles of the paired ratios."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.middle < 10 else 1 if self.middle < 100 else 0
        low, middle, high = (f"{x:.{digits}f}" for x in (self.low, self.middle, self.high))
        return f"{middle} ({low} – {high})"


class Progress:
    """A bar on standard error: the share of the steps that are done, and the present one."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.started = total, 0, time.perf_counter()

    def step(self, text: str) -> None:
        """A step begins."""
        self._show(text)
        self.begun += 1

    def finish(self) -> None:
        """The last step has ended."""
        self._show("done")
        print(file=sys.stderr)

    def _show(self, text: str) -> None:
        share = self.begun / self.total
        bar = f"{'#' * round(30 * share):<30}"
        minutes, rest = divmod(int(time.perf_counter() - self.started), 60)
        line = f"[{bar}] {100 * share:3.0f} % {minutes}:{rest:02d} {text}"
        print(f"\r{line[:110]:<110}", end="", file=sys.stderr, flush=True)


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of a run: with one thread those of the processor, which other programs do not add to."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    run()
    return now() - start


def interleaved(
    unit: Callable[[], Any],
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    begin_round: Callable[[int], Any] = lambda i: None,
) -> tuple[float, dict[str, Ratio]]:
    """The unit's median seconds, and each run's ratio to the units timed right before it."""
    seconds(unit)
    warm = {name: seconds(run) for name, run in runs.items()}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(rounds):
        begin_round(i)
        for name, run in runs.items():
            if i < (rounds if warm[name] < SLOW else 3 if warm[name] < 5 * SLOW else 1):
                pairs[name].append((seconds(unit), seconds(run)))
    ratios = {}
    for name, found in pairs.items():
        units, times = zip(*found, strict=True)
        middle = statistics.median(times) / statistics.median(units)
        each = sorted(t / u for u, t in found)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        ratios[name] = Ratio(middle, low, high)
    return statistics.median(u for found in pairs.values() for u, _ in found), ratios


def machine() -> str:
    """One line about where the figures were taken."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, load {load} at the start, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def versions(packages: list[str]) -> str:
    """Each package's version, or that it is not installed."""
    told = []
    for package in packages:
        try:
            told.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            told.append(f"{package} not installed")
    return ", ".join(told)
