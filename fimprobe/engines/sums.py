"""The running sums of a measurement: what its chunks of samples add up to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.contract import Accumulator, Weights
from fimprobe.engines.curves import CurvatureSums
from fimprobe.engines.fetch import fetch
from fimprobe.engines.problem import Plan, Problem, check_finite, coverage
from fimprobe.types import CurvatureBatch, Measured, MomentsBatch, OutputNorms


@dataclass
class Sums:
    """What the chunks of a batch add up to."""

    accumulators: dict[str, dict[str, Accumulator]] = field(default_factory=dict)
    weights: dict[str, list[Weights]] = field(default_factory=dict)
    activations: dict[str, Accumulator] = field(default_factory=dict)
    curves: dict[str, CurvatureSums] = field(default_factory=dict)
    second: list[Tensor] = field(default_factory=list)
    partners: dict[str, set[str]] = field(default_factory=dict)
    norms: list[OutputNorms] = field(default_factory=list)
    classes: int | None = None
    reached: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unseen: list[Tensor] = field(default_factory=list)
    """Numbers of outputs that are not finite, [count, of] for each chunk that was not looked at."""

    def finish(self, problem: Problem, plan: Plan) -> Measured:
        """The sums of all chunks, fetched from the device together."""
        told = coverage(problem, plan)
        bent = bool(self.curves) and "i2" not in self.notes
        host: dict[str, Any] = fetch(
            {
                "unseen": self.unseen,
                "totals": {
                    kind: {n: a.totals() for n, a in accumulators.items() if n not in plan.unused}
                    for kind, accumulators in self.accumulators.items()
                },
                "activations": {path: a.totals() for path, a in self.activations.items()},
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
                "norms": [torch.cat(parts).double() for parts in _columns(self.norms)]
                if self.norms
                else [],
            }
        )
        check_finite(host["unseen"])
        moments = {
            kind: self._batch(problem, kind, accumulators, host["totals"][kind], host, told)
            for kind, accumulators in self.accumulators.items()
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
        if self.activations:
            activations = self._batch(problem, "i1", self.activations, host["activations"], host, {})
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
        accumulators: dict[str, Accumulator],
        totals: dict[str, tuple[Tensor, Tensor]],
        host: dict[str, Any],
        told: dict[str, str],
    ) -> MomentsBatch:
        exact = self.weights.get(kind)
        count = {"i1": problem.draws.count, "empirical": 1, "ggn": 1, "jacobian": None}.get(
            kind, problem.draws.count if problem.ask.ih else 1
        )
        return MomentsBatch(
            parameters={n: accumulators[n].finish(*found) for n, found in totals.items()},
            batch_size=problem.batch.size,
            draws=count if not exact else None,
            second=host["weights"][kind][0] if exact else None,
            fourth=host["weights"][kind][1] if exact else None,
            blocks=torch.tensor(exact[0].blocks) if exact else None,
            coverage=told,
            classes=self.classes,
        )


def _columns(norms: list[OutputNorms]) -> list[tuple[Tensor, ...]]:
    names = [f.name for f in dataclasses.fields(OutputNorms)]
    return [tuple(getattr(n, name) for n in norms) for name in names]
