"""A plain training loop on scikit-learn's digits with one additional line.

Run: python examples/plain_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import fimprobe


def main(arguments: list[str] | None = None) -> None:
    """Train a small CNN and print the last report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with fimprobe.attach(model, schedule={"every": 50}, log_dir=options.out) as probe:  # the line
        for _ in range(options.epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()

    print(probe.last)
    print(f"loss {loss.item():.3f}; {len(probe.history)} reports")


if __name__ == "__main__":
    main()
