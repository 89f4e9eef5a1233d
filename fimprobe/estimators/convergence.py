"""How fast the mean trace settles with the number of inputs."""

from __future__ import annotations

import math

from torch import Tensor


def convergence(traces: Tensor) -> list[tuple[int, float]]:
    """Return (n, relative standard deviation of the mean trace of n inputs), n = 1, 2, 4, ...

    It is that over disjoint groups of the inputs, at least four of them.

    Args:
        traces: tr F̂ of every input [B].

    >>> import torch
    >>> [n for n, _ in convergence(torch.arange(1.0, 10.0))]
    [1, 2]
    """
    mean, points, size = float(traces.mean()), [], 1
    means = traces.tolist()
    while mean > 0 and len(means) >= 4:
        centre = sum(means) / len(means)
        deviation = math.dist(means, [centre] * len(means)) / (len(means) - 1) ** 0.5
        points.append((size, deviation / mean))
        means = [(a + b) / 2 for a, b in zip(means[::2], means[1::2], strict=False)]
        size *= 2
    return points
