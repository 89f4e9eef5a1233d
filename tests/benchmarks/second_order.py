"""Cost and noise of Î₂'s label variance on small models: random probes, spot checks, BackPACK, and auto.

python tests/benchmarks/second_order.py [--rounds 7]

Medians of CPU time on one thread of a whole measurement of 32 inputs with bounds and two labels, after a
first one that makes the plan; the ways of computing take turns. The noise is the standard deviation of
V2 over the rounds, which differ in labels, probes and checks, over its mean.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan

BATCH, CLASSES = 32, 10
WAYS: dict[str, Any] = {
    "2 probes": {"probes": 2},
    "spot checks": "spot_checks",
    "exact": "exact",
    "auto": "auto",
}


class Residual(nn.Module):
    """x + tanh(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(width, width), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.linear(x))


class Recurrent(nn.Module):
    """The last state of an LSTM, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp(widths: list[int], *after: type[nn.Module]) -> nn.Sequential:
    """Linear layers, each but the last followed by other modules; LayerNorm has its width."""
    model = nn.Sequential()
    for before, width in zip(widths, widths[1:], strict=False):
        model.append(nn.Linear(before, width))
        model.extend(m(width) if m is nn.LayerNorm else m() for m in after)
    return model.append(nn.Linear(widths[-1], CLASSES))


def cnn() -> nn.Sequential:
    """Two convolutions of 16×16 pictures."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, CLASSES))


MODELS = {
    "MLP 64-64-64-10, tanh": (lambda: mlp([64, 64, 64], nn.Tanh), (64,)),
    "MLP 784-128-128-10, GELU": (lambda: mlp([784, 128, 128], nn.GELU), (784,)),
    "MLP 784-512-512-10, tanh": (lambda: mlp([784, 512, 512], nn.Tanh), (784,)),
    "MLP 64-64-64-10, LayerNorm, GELU": (lambda: mlp([64, 64, 64], nn.LayerNorm, nn.GELU), (64,)),
    "residual MLP, 3 blocks of 64, tanh": (
        lambda: nn.Sequential(
            nn.Linear(64, 64), *(Residual(64) for _ in range(3)), nn.Linear(64, CLASSES)
        ),
        (64,),
    ),
    "CNN 8-16, tanh, 16×16": (cnn, (1, 16, 16)),
    "LSTM 8-32, 20 steps": (Recurrent, (20, 8)),
}


def measure_row(model: nn.Module, x: Tensor, rounds: int) -> list[str]:
    """The cells of one model."""
    plans = {way: Plan() for way in WAYS}
    seconds, v2, refused = defaultdict(list), defaultdict(list), set()
    for seed in range(rounds + 1):
        for way, option in WAYS.items():
            if way in refused:
                continue
            started = time.process_time()
            try:
                report = fimprobe.measure(
                    model,
                    x,
                    likelihood="categorical",
                    second_order=option,
                    plan=plans[way],
                    seed=seed,
                )
            except fimprobe.FimprobeError:
                refused.add(way)
                continue
            if seed:
                seconds[way].append(time.process_time() - started)
                v2[way].append(report.total.i2.label_variance or 0.0)
    cells = []
    for way in WAYS:
        if way in refused:
            cells.append("–")
            continue
        noise = statistics.stdev(v2[way]) / max(statistics.mean(v2[way]), 1e-300)
        taken = f": {plans[way].second_order.replace('_', ' ')}" if way == "auto" else ""
        cells.append(f"{1e3 * statistics.median(seconds[way]):.0f} ms, {100 * noise:.0f} %{taken}")
    return cells


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| | " + " | ".join(WAYS) + " |\n|" + "---|" * (len(WAYS) + 1))
    for name, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        row = measure_row(make(), torch.randn(BATCH, *shape), rounds)
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
