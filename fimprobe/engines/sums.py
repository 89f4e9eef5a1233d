"""The running sums of a measurement: what its chunks of samples add up to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.contract import Weights
from fimprobe.engines.curves import CurvatureSums
from fimprobe.engines.ledger import Ledger
from fimprobe.engines.problem import Plan, Problem, coverage
from fimprobe.types import CurvatureBatch, Measured, MomentsBatch, OutputNorms


@dataclass
class Sums:
    """What the chunks of a batch add up to."""

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    weights: dict[str, list[Weights]] = field(default_factory=dict)
    activations: Ledger | None = None
    curves: dict[str, CurvatureSums] = field(default_factory=dict)
    second: list[Tensor] = field(default_factory=list)
    partners: dict[str, set[str]] = field(default_factory=dict)
    norms: list[OutputNorms] = field(default_factory=list)
    classes: int | None = None
    reached: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def ledger(self, kind: str, problem: Problem) -> Ledger:
        """The moments of one kind of seeds."""
        if kind not in self.ledgers:
            sharded = set() if problem.shards is None else set(problem.shards.parts)
            self.ledgers[kind] = Ledger.of(problem.parameters, problem.diagonals, sharded)
        return self.ledgers[kind]

    def finish(self, problem: Problem, plan: Plan) -> Measured:
        """The sums of all chunks."""
        told = coverage(problem, plan)
        moments = {
            kind: self._batch(problem, kind, ledger, plan.unused, told)
            for kind, ledger in self.ledgers.items()
        }
        curvature = None
        if self.curves and "i2" not in self.notes:
            curvature = CurvatureBatch(
                {n: c.finish() for n, c in self.curves.items() if n not in plan.unused},
                self.second[0].shape[1],
                torch.cat(self.second).double().cpu(),
                problem.draws.count is None,
                self.partners,
                problem.ask.probes,
            )
        norms = None
        if self.norms:
            norms = OutputNorms(*(torch.cat(parts).double().cpu() for parts in _columns(self.norms)))
        activations = None
        if self.activations is not None:
            activations = self._batch(problem, "i1", self.activations, set(), {})
        return Measured(
            moments,
            curvature,
            norms,
            activations,
            self.seconds,
            list(self.notes.values()),
            (plan.kinks or []) if curvature is not None else [],
        )

    def _batch(
        self,
        problem: Problem,
        kind: str,
        ledger: Ledger,
        unused: set[str],
        told: dict[str, str],
    ) -> MomentsBatch:
        exact = self.weights.get(kind)
        second = torch.cat([w.second for w in exact]) if exact else None
        count = {"i1": problem.draws.count, "empirical": 1, "ggn": 1, "jacobian": None}.get(
            kind, problem.draws.count if problem.ask.ih else 1
        )
        return MomentsBatch(
            parameters=ledger.finish(unused, second),
            batch_size=problem.batch.size,
            draws=count if not exact else None,
            second=None if second is None else second.cpu(),
            fourth=torch.cat([w.fourth for w in exact]).cpu() if exact else None,
            blocks=torch.tensor(exact[0].blocks) if exact else None,
            coverage=told,
            classes=self.classes,
        )


def _columns(norms: list[OutputNorms]) -> list[tuple[Tensor, ...]]:
    names = [f.name for f in dataclasses.fields(OutputNorms)]
    return [tuple(getattr(n, name) for n in norms) for name in names]
