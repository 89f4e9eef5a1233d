"""What a probe costs a training loop: between probes, in attach, and over whole runs.

python tests/benchmarks/loop.py [--parts hooks attach runs every] [--seconds 60] [--repeats 3]
Prints the tables of docs/performance.md, section "In a loop". Runs with and without a probe take turns
in one process; ``--seconds`` is the length of one run without.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fimprobe
from fimprobe.demo import _cnn, _mlp

sys.path.append(str(Path(__file__).parents[2] / "examples"))
warnings.filterwarnings("ignore")

Step = Callable[[], Any]
SILENT: dict[str, Any] = {"tensorboard": False, "likelihood": "categorical"}
GPT2 = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}


class Block(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))


def resnet() -> nn.Module:
    blocks = [Block(8) for _ in range(16)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def gpt2(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=12, n_embd=width, **GPT2))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def wide() -> nn.Module:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


# -- between probes ----------------------------------------------------------------------------


def whole_step(model: nn.Module) -> Step:
    """Forward, backward and SGD on a batch of four."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x, y = torch.randn(4, 64), torch.randint(10, (4,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def hollow_step(model: nn.Module, *, stranger: bool = False) -> Step:
    """All modules, parameters and calls of a step, without the arithmetic: 20 µs can be seen in it.

    ``stranger``: another model's optimizer steps as well, as a GAN's does.
    """
    leaf, x = torch.zeros(4, 10, requires_grad=True), torch.zeros(4, 64)
    out = SimpleNamespace(logits=leaf)
    model.forward = lambda *args, **kwargs: out  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)

    def step() -> None:
        model(input_ids=x, attention_mask=x, labels=x)
        leaf.sum().backward()
        optimizer.step()
        if stranger:
            other.step()

    return step


def between(model: nn.Module, step: Step, schedule: dict[str, Any], blocks: int) -> list[list[float]]:
    """µs of a step without and with a probe that is not due, block by block."""
    times: list[list[float]] = [[], []]
    for block in range(blocks):
        for watched in (0, 1) if block % 2 else (1, 0):
            probe = fimprobe.attach(model, schedule=schedule, **SILENT) if watched else None
            if probe is not None and "budget" in schedule:
                probe.schedule.first = 1e9  # type: ignore[attr-defined]  # nothing fits any more
            for _ in range(60):
                step()
            quickest = float("inf")  # of five: other programs make steps longer, never shorter
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(20):
                    step()
                quickest = min(quickest, time.perf_counter() - start)
            times[watched].append(1e6 * quickest / 20)
            if probe is not None:
                assert not probe.history and probe.active and probe.steps == 160
                probe.detach()
    return times


def hooks(blocks: int) -> None:
    """The table of what hooks cost on an unprobed step: Python alone, so on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    budget, at = {"budget": 0.02}, {"at": [10**9]}
    rows: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Step], dict[str, Any]]] = {
        "MLP, 6 parameters, whole step": (_flat, whole_step, budget),
        "MLP, 6 parameters": (_flat, hollow_step, budget),
        "the same, `schedule: {at: ...}`": (_flat, hollow_step, at),
        "ResNet, 16 blocks, 132 parameters": (resnet, hollow_step, budget),
        "GPT-2, 12 layers, 148 parameters": (lambda: gpt2(24), hollow_step, budget),
        "the same beside another model's optimizer": (
            lambda: gpt2(24),
            lambda model: hollow_step(model, stranger=True),
            budget,
        ),
    }
    print("\n| hooks on an unprobed step | step without | difference, median of pairs | of minima |")
    print("|---|---|---|---|")
    for name, (make, make_step, schedule) in rows.items():
        model = make()
        plain, probed = between(model, make_step(model), schedule, blocks)
        row(name, plain, probed)
    for name, run in (("Hugging Face Trainer", trainer_steps), ("Lightning", lightning_steps)):
        found: list[list[float]] = [[], [], []]
        for block in range(max(4, blocks // 5)):
            for kind in (0, 1, 2) if block % 2 else (2, 1, 0):
                found[kind].append(run(kind))
        row(f"{name}, MLP, an empty callback", found[0], found[1])
        row(f"{name}, MLP, the probe's", found[0], found[2])
    torch.set_num_threads(threads)


def row(name: str, plain: list[float], probed: list[float]) -> None:
    """One line: medians and minima of the two."""
    pairs = statistics.median(b - a for a, b in zip(plain, probed, strict=True))
    print(
        f"| {name} | {statistics.median(plain):.0f} µs | **{pairs:.1f} µs** | "
        f"{min(probed) - min(plain):.1f} µs |",
        flush=True,
    )


def _flat() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def trainer_steps(kind: int) -> float:
    """µs a step of Hugging Face's Trainer: without, with an empty callback, with the probe's."""
    from fimprobe.integrations.huggingface import FimProbeCallback
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _flat()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    probing = FimProbeCallback(schedule={"at": [10**9]}, jsonl=False, **SILENT)
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        trainer = Trainer(
            model=Net(),
            args=TrainingArguments(folder, max_steps=300, logging_steps=10**6, **settings),
            train_dataset=[{"x": torch.zeros(64), "labels": 0}] * 64,
            callbacks=[Clock(), *([[], [TrainerCallback()], [probing]][kind])],
        )
        with told():
            trainer.train()
    return gap(marks)


def lightning_steps(kind: int) -> float:
    """The same of Lightning's."""
    from fimprobe.integrations.lightning import FimProbeCallback

    pl: Any = __import__("lightning.pytorch").pytorch
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    marks: list[float] = []

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = _flat()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            marks.append(time.perf_counter())
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    probing = FimProbeCallback(schedule={"at": [10**9]}, jsonl=False, **SILENT)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_steps=300,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[[], [pl.Callback()], [probing]][kind],
        ).fit(Net(), torch.utils.data.DataLoader([(torch.zeros(64), 0)] * 1200, 4))
    return gap(marks)


def gap(marks: list[float]) -> float:
    """µs between marks: the bound of the quickest fifth, the first ones left out."""
    gaps = [b - a for a, b in zip(marks[50:], marks[51:], strict=False)]
    return 1e6 * statistics.quantiles(gaps, n=5)[0]


# -- attach ------------------------------------------------------------------------------------


def attaching(repeats: int) -> None:
    """The table of what attach itself takes, and what the first one of a process imports."""
    print("\n| `attach`, TensorBoard and JSONL on | median | minimum – maximum |\n|---|---|---|")
    models = {
        "MLP 784-512-512-10": wide,
        "CNN 3 conv": cnn,
        "GPT-2 124M, 148 parameters": lambda: gpt2(768),
    }
    for name, make in models.items():
        model, seconds = make(), []
        for _ in range(repeats + 1):
            with tempfile.TemporaryDirectory() as folder, told():
                start = time.perf_counter()
                probe = fimprobe.attach(model, log_dir=folder)
                seconds.append(1e3 * (time.perf_counter() - start))
                probe.detach()
        print(
            f"| {name} | {statistics.median(seconds[1:]):.1f} ms | {spread(seconds[1:])} |",
            flush=True,
        )
    code = (
        "import time, tempfile, torch, fimprobe; net = torch.nn.Linear(4, 3); start = time.perf_counter()\n"
        "probe = fimprobe.attach(net, log_dir=tempfile.mkdtemp(){}); print(1e3 * (time.perf_counter() - start))"
    )
    for name, more in {
        "first of a process": "",
        "the same without pictures": ", tensorboard={'figures': False}",
    }.items():
        code_ = code.format(more).replace("log_dir=tempfile.mkdtemp(), tensorboard={", _FOLDER)
        found = [
            float(subprocess.run([sys.executable, "-c", code_], capture_output=True, text=True, check=True)
                  .stdout.split()[-1])
            for _ in range(3)
        ]  # fmt: skip
        print(
            f"| {name} (imports) | {statistics.median(found):.0f} ms | {spread(found)} |", flush=True
        )


_FOLDER = "tensorboard={'log_dir': tempfile.mkdtemp(), "


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What is printed, swallowed."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def spread(values: list[float]) -> str:
    """Minimum and maximum."""
    return f"{min(values):.1f} – {max(values):.1f}"


# -- whole runs --------------------------------------------------------------------------------

Run = Callable[[int, dict[str, Any] | None], tuple[float, fimprobe.Probe | None]]
"""A training of so many steps, with a probe of these options or none: its seconds, and the probe."""


def plain_loop(make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int) -> Run:
    """Adam and cross-entropy on 1,437 images."""

    def run(steps: int, options: dict[str, Any] | None) -> tuple[float, fimprobe.Probe | None]:
        torch.manual_seed(0)
        x, y, model = torch.randn(1437, *shape), torch.randint(10, (1437,)), make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        probe = None
        with tempfile.TemporaryDirectory() as folder, told():
            start = time.perf_counter()
            if options is not None:
                probe = fimprobe.attach(model, log_dir=folder, **options)
            for _ in range(steps):
                rows = torch.randint(1437, (batch,))
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            if probe is not None:
                probe.detach()
            return time.perf_counter() - start, probe

    return run


def gpt2_example(steps: int, options: dict[str, Any] | None) -> tuple[float, fimprobe.Probe | None]:
    """examples/gpt2_on_source.py with the options in place of its file."""
    from fimprobe.integrations.huggingface import FimProbeCallback
    from gpt2_on_source import Source, make_gpt2
    from transformers import Trainer, TrainingArguments

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
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start, None if probing is None else probing.probe


def steps_of(run: Run, seconds: float) -> int:
    """Steps that a run without a probe makes in so long."""
    steps, taken = 10, 0.0
    while taken < min(2.0, seconds / 4):
        steps *= 2
        taken = run(steps, None)[0]
    return max(1, int(steps * seconds / taken))


def whole_runs(seconds: float, repeats: int) -> None:
    """The table of the default budget: paired runs, and what the probe itself accounts for."""
    digits = (1, 8, 8)
    runs: dict[str, tuple[Run, int | None]] = {
        "demo's MLP, 1,380 steps as in the demo": (plain_loop(_mlp, digits, 64), 1380),
        "demo's CNN, 1,380 steps as in the demo": (plain_loop(_cnn, digits, 64), 1380),
        "demo's MLP": (plain_loop(_mlp, digits, 64), None),
        "demo's CNN": (plain_loop(_cnn, digits, 64), None),
        "CNN 3 conv, 32×32×3, B=64": (plain_loop(cnn, (3, 32, 32), 64), None),
        "examples/gpt2_on_source.py (Trainer)": (gpt2_example, None),
    }
    print(
        "\n| whole run, default budget of 2 % | seconds without | with / without | the probe's own "
        "account | reports | first probe | paid off after |\n|---|---|---|---|---|---|---|"
    )
    for name, (run, steps) in runs.items():
        for options in ({}, None):  # imports
            run(3, options)
        steps = steps or steps_of(run, seconds)
        plain, ratios, shares, firsts, counts = [], [], [], [], []
        for repeat in range(repeats):
            found: dict[bool, tuple[float, fimprobe.Probe | None]] = {}
            for watched in (False, True) if repeat % 2 else (True, False):
                found[watched] = run(steps, {} if watched else None)
            without, (with_, probe) = found[False][0], found[True]
            assert probe is not None
            account: Any = probe.schedule
            plain.append(without)
            ratios.append(100 * (with_ / without - 1))
            shares.append(100 * account.spent / with_)
            firsts.append(account.first)
            counts.append(len(probe.history))
        first = statistics.median(firsts)
        print(
            f"| {name} | {statistics.median(plain):.1f} | **{statistics.median(ratios):+.1f} %** "
            f"({spread(ratios)}) | {statistics.median(shares):.1f} % | {max(counts)} | {first:.2f} s | "
            f"{first / 0.02:.0f} s |",
            flush=True,
        )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["hooks", "attach", "runs", "every"])
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("fimprobe").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    if "hooks" in options.parts:
        hooks(options.blocks)
    if "attach" in options.parts:
        attaching(options.repeats)
    if "runs" in options.parts:
        whole_runs(options.seconds, options.repeats)
    if "every" in options.parts:
        every(options.repeats)


if __name__ == "__main__":
    main()
