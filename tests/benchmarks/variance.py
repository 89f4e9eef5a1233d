"""How far an estimated diagonal scatters on the problem itself, over its own repetitions."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from problems import Problem
from rows import Contender, Row
from torch import Tensor

MOST, OPTIONAL_COLUMNS, SECONDS = 12, 4, 2.0
"""Repetitions: as many as fit into so many seconds, within these limits."""


@dataclass
class Spread:
    """Σ over a parameter's entries of the variance of one estimate of Σ_b diag F_b."""

    by_parameter: dict[str, float]
    covered: float
    """Share of the model's parameters that have an estimate."""

    def total(self, names: set[str] | None = None) -> float:
        return sum(v for n, v in self.by_parameter.items() if names is None or n in names)


def measure_spread(row: Row, contender: Contender, problem: Problem) -> Spread:
    """By Welford's sums: only two tensors a parameter are held."""
    scale = float(len(problem.x)) if row.mean else 1.0
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    started, count = time.perf_counter(), 0
    while count < OPTIONAL_COLUMNS or (count < MOST and time.perf_counter() - started < SECONDS):
        count += 1
        for name, found in contender.draw().items():
            found = found.detach().double() * scale
            if count == 1:
                means[name], squares[name] = found.clone(), torch.zeros_like(found)
            else:
                delta = found - means[name]
                means[name] += delta / count
                squares[name] += delta * (found - means[name])
    covered = sum(m.numel() for m in means.values()) / problem.parameters
    return Spread({n: float(s.sum()) / (count - 1) for n, s in squares.items()}, covered)
