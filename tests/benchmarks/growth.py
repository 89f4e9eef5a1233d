"""How time and memory of a measurement grow, axis by axis, and whether any chunk size is a cliff.

python tests/benchmarks/growth.py [--repeats 3] [--only classes] [--layers 1000]

Each axis changes one number of one problem. Beside each figure stands its ratio to a forward+backward
of the same size. The slope is fitted to log time (memory) over log size, from the middle of the axis
on, where fixed costs have faded; what exceeds both its theory and the slope of forward+backward by
SLACK is flagged. ``memory_mb`` is taken on one problem, from chunks of one sample to all at once.
``--layers`` measures only what a report of a deep model costs: itself, its table, its files.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from clock import machine, seconds
from footprint import in_child, peak_mb
from problems import Problem, cnn, forward_backward, gpt2, mlp
from torch import Tensor, nn
from truth import reason

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.sinks.jsonl import JsonlSink
from fimprobe.sinks.tensorboard.sink import TensorboardSink

SLACK = 0.15
"""What a slope may exceed its bar by: the scatter of a fit to three or four points."""

CLIFF = 1.5
"""A point that takes this much longer than a straight line between its neighbours (log-log)."""

Make = Callable[[int], tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class Axis:
    """``theory``: the slope of time that the algorithm should have at most."""

    sizes: tuple[int, ...]
    make: Make
    theory: float
    option: str = ""
    """The keyword of ``measure`` that the size is given to, where it is not the network's."""


def deep(layers: int) -> tuple[nn.Module, Tensor]:
    return mlp((256,) * (layers + 1) + (10,), 128)


AXES = {
    "MLP, batch": Axis((32, 128, 512, 2048), lambda n: mlp(batch=n), 1),
    "CNN, batch": Axis((8, 32, 128, 512), lambda n: cnn(batch=n), 1),
    "GPT-2, batch": Axis((2, 8, 32), lambda n: gpt2(False, batch=n), 1),
    "GPT-2, sequence length": Axis(
        (32, 128, 512), lambda n: gpt2(False, layers=2, length=n, batch=2), 2
    ),
    "MLP, width": Axis((128, 512, 2048), lambda n: mlp((784, n, n, 10), 128), 2),
    "GPT-2, width": Axis((64, 128, 256, 512), lambda n: gpt2(False, layers=2, width=n, batch=4), 2),
    "MLP, depth": Axis((2, 8, 32), deep, 1),
    "GPT-2, depth": Axis((1, 4, 16), lambda n: gpt2(False, layers=n, batch=4), 1),
    "MLP, classes": Axis((10, 100, 1000, 10_000, 50_000), lambda n: mlp((128, 128, n), 64), 1),
    "GPT-2, vocabulary, untied": Axis(
        (1000, 10_000, 50_000), lambda n: gpt2(False, layers=1, vocabulary=n, batch=2), 1
    ),
    "GPT-2, vocabulary, tied": Axis(
        (1000, 10_000, 50_000), lambda n: gpt2(True, layers=1, vocabulary=n, batch=2), 1
    ),
    "MLP, draws": Axis((1, 2, 4, 8, 16, 17), lambda n: mlp(), 1, "draws"),
    "GPT-2, draws": Axis((1, 2, 4, 8, 16, 17), lambda n: gpt2(False, layers=2, batch=4), 1, "draws"),
    "MLP, memory_mb": Axis((1, 4, 16, 64, 512), lambda n: mlp(batch=512), 0, "memory_mb"),
    "CNN, memory_mb": Axis((4, 16, 64, 256, 2048), lambda n: cnn(), 0, "memory_mb"),
    "GPT-2, memory_mb": Axis((8, 32, 64, 128, 512), lambda n: gpt2(False), 0, "memory_mb"),
}

KINDS: dict[str, dict[str, Any]] = {
    "Î₁, S=1": {"estimators": ["i1"], "draws": 1},
    "Î₁, S=2": {"estimators": ["i1"], "draws": 2},
    "Î₁ and Î₂": {"estimators": ["i1", "i2"], "draws": 1, "second_order": {"probes": 2}},
}


def kinds_of(axis: Axis) -> dict[str, dict[str, Any]]:
    """Where draws are the axis there is no row of two draws."""
    return {k: v for k, v in KINDS.items() if axis.option != "draws" or k != "Î₁, S=2"}


def measurement(problem: Problem, axis: Axis, size: int, kind: str) -> tuple[Callable, Plan]:
    plan = Plan()
    settings: dict[str, Any] = {"memory_mb": 4096} | KINDS[kind]
    if axis.option:
        settings[axis.option] = size

    def run() -> None:
        fimprobe.measure(
            problem.model, problem.x, likelihood="categorical", bounds=False, plan=plan, **settings
        )

    return run, plan


def problem_at(name: str, size: int) -> Problem:
    torch.manual_seed(0)
    model, x = AXES[name].make(size)
    return Problem(name, model.eval(), x)


def times_at(name: str, size: int, repeats: int) -> dict[str, float]:
    """Median seconds of forward+backward and of each kind, interleaved; NaN where it failed."""
    axis = AXES[name]
    problem = problem_at(name, size)
    runs: dict[str, Callable] = {"unit": forward_backward(problem)}
    found: dict[str, list[float]] = {"unit": []}
    runs["unit"]()
    for kind in kinds_of(axis):
        run, plan = measurement(problem, axis, size, kind)
        found[kind] = []
        try:
            run()  # makes the plan, with its checks
            runs[kind] = run
        except Exception as error:
            print(f"- {name} = {size}, {kind}: {reason(error)}", flush=True)
    for _ in range(repeats):
        for kind, run in runs.items():
            if not found[kind] or found[kind][0] < 2:
                found[kind].append(seconds(run))
    return {k: statistics.median(v) if v else math.nan for k, v in found.items()}


def memory_of(name: str) -> dict[str, dict[str, float]]:
    """The child's part: MB by kind and size."""
    axis = AXES[name]
    found: dict[str, dict[str, float]] = {k: {} for k in ("unit", *kinds_of(axis))}
    for size in axis.sizes:
        problem = problem_at(name, size)
        found["unit"][str(size)] = peak_mb(forward_backward(problem), problem.forget)
        for kind in kinds_of(axis):
            try:
                run, _ = measurement(problem, axis, size, kind)
                found[kind][str(size)] = peak_mb(run)
            except Exception:  # told where the time is measured
                found[kind][str(size)] = math.nan
    return found


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Least squares of log value over log size, on the upper half of the axis."""
    start = min(len(sizes) // 2, len(sizes) - 2)
    points = list(zip(sizes[start:], values[start:], strict=True))
    pairs = [(math.log(x), math.log(y)) for x, y in points if y == y and y > 0]
    if len(pairs) < 2:
        return math.nan
    xs, ys = zip(*pairs, strict=True)
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    top = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return top / sum((x - mean_x) ** 2 for x in xs)


def cliffs(sizes: tuple[int, ...], values: list[float]) -> list[int]:
    """Sizes whose value stands above both its neighbours' line: a cliff rather than growth."""
    found = []
    for i in range(1, len(sizes) - 1):
        left, here, right = (math.log(s) for s in sizes[i - 1 : i + 2])
        share = (here - left) / (right - left)
        line = values[i - 1] ** (1 - share) * values[i + 1] ** share
        if values[i] > CLIFF * line:
            found.append(sizes[i])
    return found


def flag(axis: Axis, kind: str, times: list[float], units: list[float]) -> str:
    """What is wrong with a row, or nothing."""
    told = []
    own, plain = slope(axis.sizes, times), slope(axis.sizes, units)
    if axis.option == "memory_mb":
        worst = max(times) / times[-1]
        if worst > CLIFF:
            told.append(f"×{worst:.1f} at memory_mb={axis.sizes[times.index(max(times))]}")
        return "; ".join(told)
    if own > max(axis.theory, 0 if axis.option else plain) + SLACK:
        told.append(f"slope {own:.2f} above {axis.theory:g}")
    told += [f"cliff at {size}" for size in cliffs(axis.sizes, times)]
    return "; ".join(told)


def show(name: str, times: list[dict[str, float]], memory: dict[str, dict[str, float]]) -> None:
    axis = AXES[name]
    units = [t["unit"] for t in times]
    print(f"\n**{name}**\n")
    print(f"| | {' | '.join(f'{s:,}' for s in axis.sizes)} | slope of time, of memory | |")
    print(f"|---|{'---|' * (len(axis.sizes) + 2)}")
    for kind in ("unit", *kinds_of(axis)):
        own = [t[kind] for t in times]
        held = [memory.get(kind, {}).get(str(s), math.nan) for s in axis.sizes]
        cells = []
        for taken, unit, mb in zip(own, units, held, strict=True):
            ratio = "" if kind == "unit" else f" = {taken / unit:.2f}"
            cells.append(f"{1e3 * taken:.1f} ms{ratio}, {mb:.0f} MB" if taken == taken else "–")
        slopes = f"{slope(axis.sizes, own):.2f}, {slope(axis.sizes, held):.2f}"
        told = "" if kind == "unit" else flag(axis, kind, own, units)
        title = UNIT if kind == "unit" else kind
        print(f"| {title} | {' | '.join(cells)} | {slopes} | {told} |", flush=True)


UNIT = "forward+backward"


def outputs_of_a_report(layers: int, repeats: int) -> None:
    """The table of what follows a measurement of so many layers: minima of milliseconds.

    Every round makes a new report, so that no part finds what another round computed.
    """
    titles = ("report", "table", "a line of JSON", "TensorBoard without pictures", "all of them")
    print(f"\n| {layers:,} layers | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    torch.manual_seed(0)
    hidden = [nn.Linear(8, 8) for _ in range(layers - 1)]
    for linear in hidden:  # gradients reach the first layer
        nn.init.orthogonal_(linear.weight, gain=1.2)
    modules = [m for linear in hidden for m in (linear, nn.Tanh())]
    model, x = nn.Sequential(*modules, nn.Linear(8, 4)), torch.randn(32, 8)
    of_measure: Any = importlib.import_module("fimprobe.measurement.measure")
    build = of_measure.build_report
    kinds: dict[str, dict[str, Any]] = {
        "Î₁": {"estimators": ["i1"], "bounds": False},
        "Î₁, Î₂ and bounds": {"second_order": {"probes": 2}},
    }
    for kind, settings in kinds.items():
        calls: list[Callable[[], Any]] = []

        def remember(*args: Any, **kwargs: Any) -> Any:
            calls.append(lambda: build(*args, **kwargs))
            return build(*args, **kwargs)

        with mock.patch.object(of_measure, "build_report", remember):
            fimprobe.measure(model, x, likelihood="categorical", **settings)
        with tempfile.TemporaryDirectory() as folder:
            jsonl = JsonlSink(Path(folder) / "reports.jsonl")
            tensorboard = TensorboardSink(Path(folder) / "charts", figures=False)
            rounds = []
            for _ in range(1 + repeats):
                reports: list[fimprobe.Report] = []
                times = [seconds(lambda: reports.append(calls[-1]()))]
                times.append(seconds(reports[0].table))
                times += [seconds(lambda: sink.write(reports[0])) for sink in (jsonl, tensorboard)]
                rounds.append((*times, sum(times)))
            jsonl.close()
            tensorboard.close()
        cells = [f"{1e3 * min(column):.0f} ms" for column in zip(*rounds, strict=True)]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="axes whose name holds this")
    parser.add_argument("--layers", type=int, help="only the report of so many layers, its files")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of)))
        return
    if options.layers:
        torch.set_num_threads(1)  # processor time
    print(f"{machine()}.")
    if options.layers:
        outputs_of_a_report(options.layers, options.repeats)
        return
    for name, axis in AXES.items():
        if options.only in name:
            times = [times_at(name, size, options.repeats) for size in axis.sizes]
            show(name, times, in_child(__file__, "--memory-of", name))


if __name__ == "__main__":
    main()
