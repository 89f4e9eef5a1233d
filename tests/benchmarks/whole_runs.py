"""What attach takes, what a budget keeps over a whole training, what fixed intervals cost.

Run by ``python tests/benchmarks/loop.py --parts attach runs every``.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.cli.digits import make_cnn, make_mlp
from fimprobe.torchvision_compat import hide_broken_torchvision

hide_broken_torchvision()  # before transformers: BackPACK installs a torchvision

sys.path.append(str(Path(__file__).parents[2] / "examples"))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def wide() -> nn.Module:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What is printed, swallowed."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def spread(values: list[float]) -> str:
    """Minimum and maximum."""
    return f"{min(values):.1f} – {max(values):.1f}"


COLD = """
import time, tempfile, torch, fimprobe
net, folder = torch.nn.Linear(4, 3), tempfile.mkdtemp()
start = time.perf_counter()
fimprobe.attach(net, tensorboard={{"log_dir": folder, "figures": {figures}}})
print(1e3 * (time.perf_counter() - start))
"""


def gpt2(width: int) -> nn.Module:
    """Twelve layers: GPT-2 124M at a width of 768."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=12, n_embd=width, **ends))


def attaching(repeats: int) -> None:
    """The table of what attach itself takes, and what the first one of a process imports."""
    print("\n| `attach`, TensorBoard and JSONL on | median | minimum – maximum |\n|---|---|---|")
    models: dict[str, Callable[[], nn.Module]] = {
        "MLP 784-512-512-10": wide,
        "CNN 3 conv": cnn,
        "GPT-2 124M, 148 parameters": lambda: gpt2(768),
    }
    for name, make in models.items():
        model, found = make(), []
        for _ in range(repeats + 1):
            with tempfile.TemporaryDirectory() as folder, told():
                start = time.perf_counter()
                probe = fimprobe.attach(model, log_dir=folder)
                found.append(1e3 * (time.perf_counter() - start))
                probe.detach()
        print(f"| {name} | {statistics.median(found[1:]):.1f} ms | {spread(found[1:])} |", flush=True)
    for figures in (True, False):
        command = [sys.executable, "-c", COLD.format(figures=figures)]
        found = [
            float(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
            )
            for _ in range(repeats)
        ]
        name = "the first of a process, imports " + ("with" if figures else "without") + " matplotlib"
        print(f"| {name} | {statistics.median(found):.0f} ms | {spread(found)} |", flush=True)


Taken = tuple[float, float, "fimprobe.Probe | None"]
"""Seconds on the clock and of the processor, and the probe."""

Run = Callable[[int, "dict[str, Any] | None"], Taken]
"""A training of so many steps, with a probe of these options or none."""


class Clock:
    """Both times since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def taken(self) -> tuple[float, float]:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def plain_loop(make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int) -> Run:
    """Adam and cross-entropy on 1,437 images."""

    def run(steps: int, options: dict[str, Any] | None) -> Taken:
        torch.manual_seed(0)
        x, y, model = torch.randn(1437, *shape), torch.randint(10, (1437,)), make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        probe = None
        with tempfile.TemporaryDirectory() as folder, told():
            clock = Clock()
            if options is not None:
                probe = fimprobe.attach(model, log_dir=folder, **options)
            for _ in range(steps):
                rows = torch.randint(1437, (batch,))
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            if probe is not None:
                probe.detach()
            return *clock.taken(), probe

    return run


def gpt2_example(steps: int, options: dict[str, Any] | None) -> Taken:
    """examples/gpt2_on_source.py with the options in place of its file."""
    from gpt2_on_source import Source, make_gpt2
    from transformers import Trainer, TrainingArguments

    from fimprobe.integrations.huggingface import FimProbeCallback

    torch.manual_seed(0)
    probing = None if options is None else FimProbeCallback(**options)
    with tempfile.TemporaryDirectory() as folder, told():
        settings: Any = {"report_to": "tensorboard", "save_strategy": "no", "disable_tqdm": True}
        trainer = Trainer(
            model=make_gpt2(layers=4, width=128, length=128),
            args=TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=8, **settings
            ),
            train_dataset=Source(128),
            callbacks=[] if probing is None else [probing],
        )
        clock = Clock()
        trainer.train()
        return *clock.taken(), None if probing is None else probing.probe


def steps_of(run: Run, seconds: float) -> int:
    """Steps that a run without a probe makes in so long."""
    steps, taken = 10, 0.0
    while taken < min(2.0, seconds / 4):
        steps *= 2
        taken = run(steps, None)[0]
    return max(1, int(steps * seconds / taken))


def whole_runs(seconds: float, repeats: int, *, only: str = "") -> None:
    """The table of the default budget: paired runs, and what the probe itself accounts for.

    Args:
        seconds: Length of a run without a probe.
        repeats: Pairs of long runs; of more than one, short runs have seven times as many.
        only: Words in the names of the runs that are made.
    """
    digits = (1, 8, 8)
    runs: dict[str, tuple[Run, int | None]] = {
        "demo's MLP, 1,380 steps as in the demo": (plain_loop(make_mlp, digits, 64), 1380),
        "demo's CNN, 1,380 steps as in the demo": (plain_loop(make_cnn, digits, 64), 1380),
        "demo's MLP": (plain_loop(make_mlp, digits, 64), None),
        "demo's CNN": (plain_loop(make_cnn, digits, 64), None),
        "CNN 3 conv, 32×32×3, B=64": (plain_loop(cnn, (3, 32, 32), 64), None),
        "examples/gpt2_on_source.py, its 200 steps (Trainer)": (gpt2_example, 200),
        "the same, longer": (gpt2_example, None),
    }
    print(
        "\n| whole run, default budget of 2 % | seconds without | with / without | processor time | the "
        "probe's own account | in the allowance | previews, whole | first whole | later whole |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name, (run, steps) in runs.items():
        if only not in name:
            continue
        for watched in (True, False):  # imports
            run(3, {} if watched else None)
        steps = steps or steps_of(run, seconds)
        plain, ratios, busy, shares, free, firsts, wholes = [], [], [], [], [], [], []
        counts: list[tuple[int, int]] = []
        for repeat in range(repeats if repeats == 1 or run(steps, None)[0] > 10 else 7 * repeats):
            found: dict[bool, Taken] = {}
            for watched in (False, True) if repeat % 2 else (True, False):
                found[watched] = run(steps, {} if watched else None)
            (without, idle, _), (with_, used, probe) = found[False], found[True]
            assert probe is not None
            busy.append(100 * (used / idle - 1))
            account: Any = probe.schedule
            plain.append(without)
            ratios.append(100 * (with_ / without - 1))
            shares.append(100 * account.spent / with_)
            free.append(account.free)
            costs = [account.costs.of[extent] for extent in account.costs.extents[1:]]
            firsts += [cost.first for cost in costs if cost.first is not None][:1]
            wholes += [seconds for cost in costs for seconds in cost.later][:1]
            previews = sum(report.total.i2 is None for report in probe.history)
            counts.append((previews, len(probe.history) - previews))
        print(
            f"| {name} | {statistics.median(plain):.1f} | **{statistics.median(ratios):+.1f} %** "
            f"({spread(ratios)}) | {statistics.median(busy):+.1f} % ({spread(busy)}) | "
            f"{statistics.median(shares):.1f} % | {statistics.median(free):.1f} s | "
            f"{max(counts)[0]}, {max(counts)[1]} | {median_seconds(firsts)} | {median_seconds(wholes)} |",
            flush=True,
        )


def median_seconds(seconds: list[float]) -> str:
    """The median in words, or a dash."""
    return f"{statistics.median(seconds):.2f} s" if seconds else "–"


def every(repeats: int) -> None:
    """The table of fixed intervals: ratios of a step's time, the first probe left out."""
    intervals = (1, 4, 16, 64, 256)
    lean = {"estimators": ["i1"], "bounds": False, "draws": 1}
    rows: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = {
        "MLP 784-512-512-10, B=256, Î₁": (wide(), (256, 784), {**lean, "batch": 256}),
        "CNN 3 conv, B=64, Î₁": (cnn(), (64, 3, 32, 32), {**lean, "batch": 64}),
        "CNN 3 conv, B=64, Î₁ of 32 inputs": (cnn(), (64, 3, 32, 32), lean),
        "CNN 3 conv, B=64, defaults": (cnn(), (64, 3, 32, 32), {}),
    }
    print(f"\n| step with / without, a probe every | {' | '.join(map(str, intervals))} |")
    print("|---|" + "---|" * len(intervals))
    for name, (model, shape, options) in rows.items():
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        optimizer = torch.optim.SGD(model.parameters(), 0.0)

        def steps(
            count: int, model: Any = model, x: Any = x, y: Any = y, optimizer: Any = optimizer
        ) -> float:
            start = time.perf_counter()
            for _ in range(count):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            return time.perf_counter() - start

        cells = []
        for interval in intervals:
            ratios, count = [], max(16, interval)
            for repeat in range(repeats + 1):
                with tempfile.TemporaryDirectory() as folder, told():
                    probe = fimprobe.attach(
                        model, log_dir=folder, likelihood="categorical",
                        schedule={"every": interval}, **options,
                    )  # fmt: skip
                    steps(1)  # the first probe verifies the model
                    probed = steps(count)
                    assert len(probe.history) == 1 + count // interval
                    probe.detach()
                if repeat:  # the first round imports
                    ratios.append(probed / steps(count))
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
