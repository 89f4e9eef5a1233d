"""The running sums of a measurement: what its chunks of samples add up to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.curvature.accumulator import CurvatureAccumulator
from fimprobe.engines.moments.accumulators import MomentAccumulators, Totals
from fimprobe.engines.primitives.device_transfer import to_host
from fimprobe.engines.problem.cotangents import seen_mass
from fimprobe.engines.problem.problem import Problem, check_finite
from fimprobe.engines.problem.weights import Weights
from fimprobe.engines.tracing.plan import Plan, coverage
from fimprobe.likelihoods.base import OutputNorms
from fimprobe.statistics import CurvatureBatch, Measured, MomentsBatch


@dataclass
class RunningResults:
    """What the chunks of a batch add up to."""

    ledgers: dict[str, MomentAccumulators] = field(default_factory=dict)
    weights: dict[str, list[Weights]] = field(default_factory=dict)
    inverse_weights: list[Tensor] = field(default_factory=list)
    """1/w [b, S] of size-biased labels, for each chunk."""
    seen: list[Tensor] = field(default_factory=list)
    """Σ‖δ‖² of the labels, as the model's mean over draws, and its expectation, for each chunk."""
    activations: MomentAccumulators | None = None
    curves: dict[str, CurvatureAccumulator] = field(default_factory=dict)
    second: list[Tensor] = field(default_factory=list)
    partners: dict[str, set[str]] = field(default_factory=dict)
    norms: list[OutputNorms] = field(default_factory=list)
    classes: int | None = None
    reached: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unseen: list[Tensor] = field(default_factory=list)
    """Numbers of outputs that are not finite, [count, of] for each chunk that was not looked at."""

    def ledger(self, kind: str, problem: Problem) -> MomentAccumulators:
        """The moments of one kind of seeds."""
        if kind not in self.ledgers:
            sharded = set() if problem.shards is None else set(problem.shards.parts)
            self.ledgers[kind] = MomentAccumulators.of(
                problem.parameters,
                diagonals=problem.diagonals and kind != "jacobian",
                sampled=kind == "i1",
                bare=kind == "jacobian",
                sharded=sharded,
            )
        return self.ledgers[kind]

    def finish(self, problem: Problem, plan: Plan) -> Measured:
        """The sums of all chunks, fetched from the device together."""
        told = coverage(problem, plan)
        bent = bool(self.curves) and "i2" not in self.notes
        host: dict[str, Any] = to_host(
            {
                "unseen": self.unseen,
                "totals": {kind: ledger.totals() for kind, ledger in self.ledgers.items()},
                "activations": None if self.activations is None else self.activations.totals(),
                "weights": {
                    kind: [
                        torch.cat([getattr(w, of) for w in weights]) for of in ("second", "fourth")
                    ]
                    for kind, weights in self.weights.items()
                },
                "curves": {
                    n: c.joined() for n, c in self.curves.items() if bent and n not in plan.unused
                },
                "second": torch.cat(self.second).double() if bent else None,
                "inverse_weights": torch.cat(self.inverse_weights) if self.inverse_weights else None,
                "seen": torch.stack(self.seen).sum(0) if self.seen else None,
                "norms": [torch.cat(parts).double() for parts in _columns(self.norms)]
                if self.norms
                else [],
            }
        )
        check_finite(host["unseen"])
        moments = {
            kind: self._batch(problem, kind, ledger, host["totals"][kind], host, plan.unused, told)
            for kind, ledger in self.ledgers.items()
        }
        curvature = None
        if bent:
            curvature = CurvatureBatch(
                {n: self.curves[n].finish(parts) for n, parts in host["curves"].items()},
                self.second[0].shape[1],
                host["second"],
                problem.draws.count is None,
                self.partners,
                problem.ask.probes,
            )
        norms = OutputNorms(*host["norms"]) if self.norms else None
        activations = None
        if self.activations is not None:
            found = host["activations"]
            activations = self._batch(problem, "i1", self.activations, found, host, set(), {})
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
        ledger: MomentAccumulators,
        totals: Totals,
        host: dict[str, Any],
        unused: set[str],
        told: dict[str, str],
    ) -> MomentsBatch:
        exact = self.weights.get(kind)
        second, fourth = host["weights"][kind] if exact else (None, None)
        count = {"i1": problem.draws.count, "empirical": 1, "ggn": 1, "jacobian": None}.get(
            kind, problem.draws.count if problem.ask.ih else 1
        )
        labelled = kind == "i1"
        seen = host["seen"].tolist() if labelled and self.seen else None
        return MomentsBatch(
            parameters=ledger.finish(totals, second, unused),
            batch_size=problem.batch.size,
            draws=count if not exact else None,
            second=second,
            fourth=fourth,
            blocks=torch.tensor(exact[0].blocks) if exact else None,
            inverse_weights=host["inverse_weights"] if labelled else None,
            seen_mass=seen_mass(problem, seen),
            fisher_trace=seen[1] if seen else None,
            coverage=told,
            classes=self.classes,
        )


def _columns(norms: list[OutputNorms]) -> list[tuple[Tensor, ...]]:
    names = [f.name for f in dataclasses.fields(OutputNorms)]
    return [tuple(getattr(n, name) for n in norms) for name in names]
