"""What a row of the table is, and fimprobe's own rows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from problems import Problem
from torch import Tensor

import fimprobe
from fimprobe.engines.tracing.plan import Plan

Diagonal = dict[str, Tensor]
"""Parameter -> estimate of the diagonal of F, summed over the batch unless the row says otherwise."""


@dataclass(frozen=True)
class Contender:
    """``run`` is timed; ``draw`` runs anew and has the diagonal out of what that left behind.

    ``forget`` frees what a run leaves behind on the model, which would hide its memory.
    """

    run: Callable[[], Any]
    draw: Callable[[], Diagonal]
    forget: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Row:
    """``exact``: no labels are drawn. ``mean``: the peer divides by the batch size."""

    name: str
    make: Callable[[Problem], Contender]
    package: str = "fimprobe"
    exact: bool = False
    mean: bool = False


def ours(name: str, *, estimator: str = "i1", **options: Any) -> Row:
    """A measurement as a user makes it, repeated with one plan as ``attach`` does."""
    settings: dict[str, Any] = {"estimators": ["i1"], "bounds": False} | options

    def make(problem: Problem) -> Contender:
        model, x, plan, seeds = copy.deepcopy(problem.model), problem.x, Plan(), itertools.count()

        def run(**more: bool) -> fimprobe.Report:
            chosen = settings | {"plan": plan, "seed": next(seeds)} | more
            return fimprobe.measure(model, x, likelihood="categorical", **chosen)

        def draw() -> Diagonal:
            groups = run(diagonals=True).parameters
            found = {n: getattr(g, estimator).diagonal or {} for n, g in groups.items()}
            return {n: d * len(x) for each in found.values() for n, d in each.items()}

        return Contender(run, draw)

    return Row(name, make, exact=settings.get("draws") == "exact")


_TWO = {"estimators": ["i1", "i2"], "draws": 1, "memory_mb": 4096}
_PROBES = {"second_order": {"probes": 2}}
OURS = [
    ours("**Î₁, S=1**", draws=1),
    ours("**Î₁, S=2**", draws=2),
    ours("Î₁, S=1, `diagonals=True`", draws=1, diagonals=True),
    ours("**Î₁, exact labels**", draws="exact"),
    ours("**Î₁ and Î₂, S=1, 2 probes**", **_TWO, **_PROBES, estimator="i2"),
    ours("Î₁ and Î₂, S=1, exact (BackPACK)", **_TWO, second_order="exact", estimator="i2"),
    ours("**Î₁, Î₂ and all bounds, 2 probes**", **_TWO, **_PROBES, bounds=True, estimator="i2"),
    ours("Î_H next to Î₁, S=1", estimators=["i1", "ih"], draws=1, estimator="ih"),
]
"""Labels are size-biased, the default."""
