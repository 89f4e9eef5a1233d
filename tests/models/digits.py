"""Handwritten digits, and networks trained on them to confidence."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] in [0, 1], and their labels."""
    from sklearn.datasets import (
        load_digits,
    )  # which processes that are given the digits need not import

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def confident_mlp(confidence: float = 0.99) -> nn.Module:
    """A small network, trained until the mean probability of its first choices is reached."""
    return copy.deepcopy(_trained(confidence))


@functools.cache
def _trained(confidence: float) -> nn.Module:
    x, y = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(*s, dtype=torch.float32) for s in ((64, 16), (16, 12), (12, 10))]
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2])
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        while True:
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                if float(model(x).softmax(1).amax(1).mean()) >= confidence:
                    return model.eval()
