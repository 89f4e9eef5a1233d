"""A recorded forward of some samples, with all that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.tape import FallbackCall, Tape
from fimprobe.model.batch import Batch


@dataclass
class Chunk:
    """One chunk's recorded forward."""

    problem: Problem
    plan: Plan
    tape: Tape
    calls: list[tuple[FallbackCall, dict[str, Tensor]]]
    pieces: dict[str, list[tuple[FallbackCall, str]]]
    names: dict[int, str]
    batch: Batch
    rows: slice
    room: float
