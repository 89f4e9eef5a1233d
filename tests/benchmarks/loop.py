"""What a probe costs a training loop: between probes, in attach, and over whole runs.

python tests/benchmarks/loop.py [--parts hooks attach runs every] [--seconds 60] [--repeats 3] \
    [--only WORDS]
Prints the tables of docs/performance.md, section "In a loop". Runs with and without a probe take turns
in one process; ``--seconds`` is the length of one run without, and ``--only`` keeps the
whole runs whose names hold the words. One pair of the demo's MLP takes seconds:
``--parts runs --only "as in the demo" --repeats 1``.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_runs import attaching, every, gpt2, told, whole_runs

import fimprobe

warnings.filterwarnings("ignore")

Step = Callable[[], Any]
SILENT: dict[str, Any] = {"tensorboard": False, "likelihood": "categorical"}


class Block(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))


def resnet() -> nn.Module:
    blocks = [Block(8) for _ in range(16)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


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
                budget: Any = probe.schedule
                budget.free, budget.spent = 5.0, 1e9  # nothing fits any more
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
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from fimprobe.integrations.huggingface import FimProbeCallback

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["hooks", "attach", "runs", "every"])
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    logging.getLogger("fimprobe").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    if "hooks" in options.parts:
        hooks(options.blocks)
    if "attach" in options.parts:
        attaching(options.repeats)
    if "runs" in options.parts:
        whole_runs(options.seconds, options.repeats, only=options.only)
    if "every" in options.parts:
        every(options.repeats)


if __name__ == "__main__":
    main()
