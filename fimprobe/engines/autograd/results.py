"""The running results of a measurement: sums over its chunks of samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.curvature.accumulator import CurvatureAccumulator
from fimprobe.engines.moments.accumulators import MomentAccumulators, Totals
from fimprobe.engines.primitives.device_transfer import to_host
from fimprobe.engines.problem.label_cotangents import seen_mass
from fimprobe.engines.problem.problem import Problem, check_finite
from fimprobe.engines.problem.weights import PassWeights
from fimprobe.engines.spot_checks.first_order import FirstOrderNotes
from fimprobe.engines.tracing.plan import Plan, coverage
from fimprobe.likelihoods.base import OutputNorms
from fimprobe.statistics import CurvatureBatch, Measured, MomentsBatch, SpotChecks


@dataclass(kw_only=True)
class RunningResults:
    """Sums over the chunks of a batch; per-sample results are lists with one tensor for each chunk.

    Attributes:
        moments: Moments by the kind of cotangents.
        pass_weights: Weights of exact passes by the kind of cotangents.
        inverse_weights: 1/w [b, S] of size-biased labels.
        score_mass: Σ‖δ‖² of the labels, as the mean over draws, and its expectation [2].
        activations: Moments of the gradients at the layers' inputs.
        curvature: Second derivatives by parameter.
        curvature_weights: Weights of R² [b, labels].
        interacting: Parameters with interacting uses, and what they interact with.
        fisher_by_labels: Whether F of Î₂ comes from the labels of Î₁; None before that is known.
        first_order_notes: What spot checks need of the passes of Î₁.
        spot_checks: V2 by spot checks; None if it is not measured so.
        norms: Norms of I(h) and M.
        classes: Number of outputs that share one label.
        reached: Parameters on which the outputs depend.
        seconds: Time of each part.
        notes: Why a part was not measured.
        non_finite: Counts [non-finite outputs, outputs] of chunks that were not checked at once.
    """

    moments: dict[str, MomentAccumulators] = field(default_factory=dict)
    pass_weights: dict[str, list[PassWeights]] = field(default_factory=dict)
    inverse_weights: list[Tensor] = field(default_factory=list)
    score_mass: list[Tensor] = field(default_factory=list)
    activations: MomentAccumulators | None = None
    curvature: dict[str, CurvatureAccumulator] = field(default_factory=dict)
    curvature_weights: list[Tensor] = field(default_factory=list)
    interacting: dict[str, set[str]] = field(default_factory=dict)
    fisher_by_labels: bool | None = None
    first_order_notes: FirstOrderNotes = field(default_factory=FirstOrderNotes)
    spot_checks: SpotChecks | None = None
    norms: list[OutputNorms] = field(default_factory=list)
    classes: int | None = None
    reached: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    non_finite: list[Tensor] = field(default_factory=list)

    def accumulators(self, kind: str, problem: Problem) -> MomentAccumulators:
        """The moments of one kind of cotangents; empty ones at the first call.

        Args:
            kind: The kind of cotangents: "i1", "ih", "empirical", "ggn" or "jacobian".
            problem: The measurement, with its parameters.
        """
        if kind not in self.moments:
            sharded = set() if problem.shards is None else set(problem.shards.parts)
            self.moments[kind] = MomentAccumulators.of(
                problem.parameters,
                diagonals=problem.diagonals and kind != "jacobian",
                with_entries=kind == "i1",
                sums_only=kind == "jacobian",
                sharded=sharded,
            )
        return self.moments[kind]

    def finish(self, problem: Problem, plan: Plan) -> Measured:
        """Add up the results of all chunks, fetched from the device in one transfer.

        Args:
            problem: The measurement.
            plan: How each parameter was reached. Parameters that it lists as unused are left out.

        Returns:
            The measured sums, on the host.

        Raises:
            BatchError: If some outputs were not finite.
        """
        on_host: dict[str, Any] = to_host(self._on_device(plan))
        check_finite(on_host["non_finite"])
        descriptions = coverage(problem, plan)
        moments = {}
        for kind in self.moments:
            moments[kind] = self._moments_batch(problem, kind, on_host, exclude=plan.unused)
            moments[kind].coverage = descriptions
        norms = None
        if self.norms:
            norms = OutputNorms(**dict(zip(_norm_names(), on_host["norms"], strict=True)))
        curvature = self._curvature_batch(problem, on_host) if self._has_curvature else None
        return Measured(
            moments=moments,
            curvature=curvature,
            spot_checks=self.spot_checks,
            norms=norms,
            activations=self._activations_batch(problem, on_host),
            seconds=self.seconds,
            notes=list(self.notes.values()),
            kinks=(plan.kinks or []) if curvature is not None or self.spot_checks else [],
        )

    @property
    def _has_curvature(self) -> bool:
        return bool(self.curvature) and "i2" not in self.notes

    def _on_device(self, plan: Plan) -> dict[str, Any]:
        """Everything that is fetched, joined over the chunks."""
        curvature = {}
        if self._has_curvature:
            used = {n: c for n, c in self.curvature.items() if n not in plan.unused}
            curvature = {n: c.joined() for n, c in used.items()}
        return {
            "non_finite": self.non_finite,
            "totals": {kind: moments.totals() for kind, moments in self.moments.items()},
            "activations": None if self.activations is None else self.activations.totals(),
            "pass_weights": {
                kind: [torch.cat([getattr(w, power) for w in weights]) for power in _POWERS]
                for kind, weights in self.pass_weights.items()
            },
            "curvature": curvature,
            "curvature_weights": torch.cat(self.curvature_weights).double()
            if self._has_curvature
            else None,
            "inverse_weights": torch.cat(self.inverse_weights) if self.inverse_weights else None,
            "score_mass": torch.stack(self.score_mass).sum(0) if self.score_mass else None,
            "norms": [
                torch.cat([getattr(n, name) for n in self.norms]).double()
                for name in (_norm_names() if self.norms else [])
            ],
        }

    def _moments_batch(
        self, problem: Problem, kind: str, on_host: dict[str, Any], *, exclude: set[str]
    ) -> MomentsBatch:
        """The moments of one kind of cotangents, without those of excluded parameters."""
        return self._batch(
            problem, kind, self.moments[kind], on_host["totals"][kind], on_host, exclude
        )

    def _activations_batch(self, problem: Problem, on_host: dict[str, Any]) -> MomentsBatch | None:
        """The moments of the gradients at the layers' inputs."""
        if self.activations is None:
            return None
        totals = on_host["activations"]
        return self._batch(problem, "i1", self.activations, totals, on_host, set())

    def _batch(
        self,
        problem: Problem,
        kind: str,
        accumulators: MomentAccumulators,
        totals: Totals,
        on_host: dict[str, Any],
        exclude: set[str],
    ) -> MomentsBatch:
        exact = self.pass_weights.get(kind)
        square, quartic = on_host["pass_weights"][kind] if exact else (None, None)
        # As an estimator of its own, Î_H has as many vectors as Î₁ has labels. For Î₂ it only gives
        # the diagonal of F, and one vector is enough.
        num_vectors = problem.draws.count if problem.request.ih else 1
        draws = {"i1": problem.draws.count, "empirical": 1, "ggn": 1, "jacobian": None}
        of_labels = kind == "i1"
        mass = on_host["score_mass"].tolist() if of_labels and self.score_mass else None
        return MomentsBatch(
            parameters=accumulators.finish(totals, square, exclude),
            batch_size=problem.batch.size,
            draws=None if exact else draws.get(kind, num_vectors),
            square_weights=square,
            quartic_weights=quartic,
            blocks=torch.tensor(exact[0].block) if exact else None,
            inverse_weights=on_host["inverse_weights"] if of_labels else None,
            seen_mass=seen_mass(problem, mass),
            fisher_trace=mass[1] if mass else None,
            classes=self.classes,
        )

    def _curvature_batch(self, problem: Problem, on_host: dict[str, Any]) -> CurvatureBatch:
        """The second derivatives of all parameters."""
        per_sample = on_host["curvature"]
        return CurvatureBatch(
            parameters={n: self.curvature[n].finish(results) for n, results in per_sample.items()},
            draws=self.curvature_weights[0].shape[1],
            weights=on_host["curvature_weights"],
            exact=problem.draws.count is None,
            partners=self.interacting,
            probes=problem.request.probes,
        )


_POWERS = ("square", "quartic")
"""The fields of :class:`PassWeights` that are fetched."""


def _norm_names() -> list[str]:
    return [f.name for f in dataclasses.fields(OutputNorms)]
