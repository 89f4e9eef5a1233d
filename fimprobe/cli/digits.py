"""scikit-learn's handwritten digits and two small models for them, as the demo trains them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Digits(NamedTuple):
    """Images [B, 1, 8, 8] from 0 to 1 and labels [B]: to train on, and held out."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """Return 1,437 digits to train on and 360 held out, the same in every run.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]
    return Digits(x=x[train], y=y[train], test_x=x[test], test_y=y[test])


def make_mlp() -> nn.Module:
    """Return three Linear layers with tanh between them."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def make_cnn() -> nn.Module:
    """Return two convolutions, the first one before a BatchNorm, and a Linear layer."""
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
