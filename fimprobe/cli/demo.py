"""``fimprobe demo``: an MLP and a CNN on scikit-learn's handwritten digits, probed as they train."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

import fimprobe
from fimprobe.errors import FimprobeError
from fimprobe.report.format import percent
from fimprobe.report.report import Report
from fimprobe.report.table import format_trend


def run_demo(*, epochs: int, log_dir: str) -> dict[str, list[Report]]:
    """Train both models on 1,437 digits, print what the probe saw; the reports by model."""
    try:
        from sklearn.datasets import load_digits
        from tqdm import tqdm
    except ImportError as error:
        raise FimprobeError(
            f"the demo needs {error.name}; run: pip install 'fimprobe[demo]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]
    run = Path(log_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}"
    found = {}
    for name, make in {"mlp": _mlp, "cnn": _cnn}.items():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(1)
        probe = fimprobe.attach(
            model, log_dir=run / name, draws="exact", batch=64, schedule={"every": 20}
        )
        with probe:
            for _ in tqdm(range(epochs), desc=name, unit="epoch"):
                model.train()
                for rows in torch.randperm(len(train), generator=order).split(64):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x[train[rows]]), y[train[rows]])
                    loss.backward()
                    optimizer.step()
        found[name] = probe.history
        _tell(name, model, probe, x[test], y[test])
    print(f"\nSee every layer over time:   tensorboard --logdir {run}")
    print("                             (its tabs Custom scalars, Images and Text)")
    print(f"The numbers in the terminal: fimprobe show {run / 'mlp'}")
    print(f"The same as one page:        fimprobe show {run / 'mlp'} --html page.html")
    return found


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _tell(name: str, model: nn.Module, probe: fimprobe.Probe, x: Tensor, y: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(x), 1)
    accuracy = float((p.argmax(1) == y).double().mean())
    reports = probe.history
    print(
        f"\n=== {name}: {accuracy:.1%} of held-out digits right, mean confidence "
        f"{float(p.amax(1).mean()):.1%} ==="
    )
    print(f"likelihood: {probe.likelihood.name if probe.likelihood else '?'} ({probe.decision})\n")
    print(reports[-1])
    print("\n" + format_trend([r.to_dict() for r in reports]))
    known = [(r.step, r.error_of("i1")) for r in reports if r.error_of("i1") is not None]
    (_, first), (step, last) = known[0], known[-1]
    print(
        f"\nWhat it found: as the {name} became confident, the relative error of Î₁ with one drawn "
        f"label for each of {reports[0].batch_size} inputs went from {percent(first)} to "
        f"{percent(last)}. Near 100 % an estimate is noise."
    )
    if step != reports[-1].step:
        print(
            f"From step {step:,} on it is unknown: fewer and fewer of the inputs carry the Fisher "
            "information."
        )
