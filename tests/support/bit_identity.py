"""Trainings to compare bit by bit: fixed data, a plain loop, equality of nested states."""

import random

import numpy as np
import torch
import torch.nn.functional as F

EVERY = {"schedule": {"every": 1}, "tensorboard": False}


LEAN = {**EVERY, "estimators": ("i1",), "bounds": False}


def data(count, *shape, classes=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, *shape, generator=generator)
    return x, torch.randint(classes, (count,), generator=generator)


def train(model, steps, x, y, optimizer=None, each=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        out = model(x)
        F.cross_entropy(out, y, reduction="sum").backward()
        optimizer.step()
        if each is not None:
            each(step)
    return optimizer


def streams():
    return (
        torch.get_rng_state().numpy().tobytes(),
        [str(x) for x in np.random.get_state()],
        np.random.get_state()[1].tobytes(),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def same(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
