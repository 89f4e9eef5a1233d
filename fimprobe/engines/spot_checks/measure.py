"""V2 = Σ_e E_y R_ee² of every layer, from differences of forward passes at a few entries.

V2 is the mean over inputs of Σ_e (∂²_ee h)ᵀ I(h) (∂²_ee h). A check draws an input and an entry of
the layer, computes ∂²_ee h as a central second difference of all outputs, and integrates over labels
exactly. Divided by the probability of the draw it is an unbiased estimate that is never negative. See
docs/theory.md, "Second derivatives by spot checks".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.allocation import (
    PILOT,
    SLOTS_PER_INPUT,
    SLOTS_PER_LAYER,
    allot,
    num_checks_at_least,
    relative_variances,
)
from fimprobe.engines.spot_checks.guard import ShiftGuard
from fimprobe.engines.spot_checks.passes import SpotPasses
from fimprobe.engines.spot_checks.proposals import LayerProposal
from fimprobe.engines.spot_checks.slots import CheckedEntry, Slot, make_strata
from fimprobe.engines.spot_checks.steering import note_checks, share_by_kind, share_by_layer
from fimprobe.engines.spot_checks.step_sizes import StepSizes
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.spot_history import SpotHistory
from fimprobe.statistics import SpotChecks

PILOT_REPEATS, MAIN_REPEATS = 2, 1
"""Times that a check is repeated with another step at most."""


def measure_spot_checks(
    problem: Problem,
    plan: Plan,
    layers: Mapping[str, LayerProposal],
    dtype: torch.dtype,
) -> SpotChecks:
    """Estimate V2 of every layer.

    Args:
        problem: The measurement.
        plan: A verified plan.
        layers: The proposals of the layers that can bend.
        dtype: The coarsest floating-point type of the computation: float32 or float64.

    Raises:
        CannotHold: If the model has kinks that cannot be held, or the shifted passes are not those of
            single samples.
    """
    if not layers:
        return SpotChecks(strata=[])
    checker = SpotChecker(problem=problem, plan=plan, layers=layers, dtype=dtype)
    with checker.passes.forward.exact_kernels():
        checker.passes.record_baseline()
        limit = max(
            SLOTS_PER_INPUT * problem.batch.size, SLOTS_PER_LAYER * len(layers), checker.least
        )
        known = plan.spot_history.covers(n for p in layers.values() for n in p.parameters)
        if not known:
            checker.run_pilot()
            limit -= PILOT * len(layers)
        checker.run_main(limit)
        checker.guard.compare(problem, checker.passes.forward)
    checker.note_history()
    return checker.result()


@dataclass(kw_only=True)
class SpotChecker:
    """All checks of one measurement.

    Attributes:
        problem: The measurement.
        plan: A verified plan.
        layers: The proposals.
        dtype: The coarsest type of the computation.
        pilot: Results of the first checks of each layer.
        main: Results of the others.
        guard: Compares some checks with single samples.
        passes: Runs the checks.
    """

    problem: Problem
    plan: Plan
    layers: Mapping[str, LayerProposal]
    dtype: torch.dtype
    pilot: dict[str, list[CheckedEntry]] = field(default_factory=dict)
    main: dict[str, list[CheckedEntry]] = field(default_factory=dict)
    guard: ShiftGuard = field(init=False)
    passes: SpotPasses = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the passes, with what earlier measurements have shown."""
        self.history = self.plan.spot_history
        self.least = num_checks_at_least(sum(p.numel() for p in self.problem.parameters.values()))
        self.steps = StepSizes(self.dtype, self.history.etas)
        self.generator = torch.Generator().manual_seed(self.problem.draws.seed ^ _STREAM)
        known = sorted(self.history.guarded)
        self.guard = ShiftGuard(known=set(known))
        if known:
            place = int(torch.randint(len(known), (1,), generator=self.generator))
            self.guard.again = known[place]
        self.passes = SpotPasses(
            problem=self.problem,
            plan=self.plan,
            kinds={layer: proposal.kind for layer, proposal in self.layers.items()},
            dtype=self.dtype,
            generator=self.generator,
            guard=self.guard,
        )

    def run_pilot(self) -> None:
        """Run a few checks of each layer, which show the step sizes and where V2 is."""
        slots = [slot for layer in self.layers for slot in self._draw(layer, PILOT)]
        self.passes.compares_derivatives = True
        values = self.check(slots)
        self.passes.compares_derivatives = False
        self._adapt_steps(values)
        for value in self.settle(values, PILOT_REPEATS):
            self.pilot.setdefault(value.slot.layer, []).append(value)

    def run_main(self, limit: int) -> None:
        """Run checks where the noise is, by what the pilot or earlier measurements have shown.

        Args:
            limit: Largest number of checks.
        """
        steering = self.history
        if self.pilot:
            steering = SpotHistory()
            note_checks(steering, self.layers, self.pilot)
            share_by_kind(self.layers, steering)
        else:
            share_by_layer(self.layers, steering)
        means = {
            layer: sum(steering.values.get(n, 0.0) for n in proposal.parameters)
            for layer, proposal in self.layers.items()
        }
        counts = allot(means, relative_variances(steering, self.passes.kinds), limit, self.least)
        slots = [slot for layer in self.layers for slot in self._draw(layer, counts[layer])]
        for value in self.settle(self.check(slots), MAIN_REPEATS):
            self.main.setdefault(value.slot.layer, []).append(value)

    def check(self, slots: Sequence[Slot]) -> list[CheckedEntry]:
        """Run checks with the η of their parameters; return the results in another order."""
        return self.passes.check(slots, [self.steps[slot.parameter] for slot in slots])

    def _adapt_steps(self, values: Sequence[CheckedEntry]) -> None:
        """Adapt η of every parameter to the median of its second differences."""
        better: dict[str, list[float]] = {}
        for value in values:
            eta = self.steps.better(value.eta, value.difference)
            better.setdefault(value.slot.parameter, []).append(eta)
        for name, etas in better.items():
            self.steps.etas[name] = statistics.median(etas)

    def note_history(self) -> None:
        """Keep what this measurement has shown for later ones."""
        values = {name: self.pilot.get(name, []) + self.main.get(name, []) for name in self.layers}
        self.history.fade()
        note_checks(self.history, self.layers, values)
        self._adapt_steps([value for of_layer in self.main.values() for value in of_layer])
        self.history.etas = self.steps.etas
        self.history.guarded |= set(self.guard.noted)

    def settle(self, values: list[CheckedEntry], repeats: int) -> list[CheckedEntry]:
        """Repeat checks whose differences are near rounding, or large, with better steps.

        What is repeated is the same entry of the same input: the choice does not pull the sum.

        Args:
            values: Results of checks.
            repeats: Times that a check is repeated at most.

        Returns:
            The results, in another order.
        """
        for _ in range(repeats):
            poor = [v for v in values if not self.steps.is_settled(v.eta, v.difference)]
            if not poor:
                break
            values = [v for v in values if self.steps.is_settled(v.eta, v.difference)]
            eta = [self.steps.better(v.eta, v.difference) for v in poor]
            values += self.passes.check([v.slot for v in poor], eta)
        return values

    def _draw(self, layer: str, count: int) -> list[Slot]:
        """Draw checks of one layer."""
        size = self.problem.batch.size
        return [
            Slot(
                layer=layer,
                parameter=drawn.parameter,
                row=drawn.row,
                entry=drawn.entry,
                weight=1 / (size * drawn.probability),
            )
            for drawn in self.layers[layer].draw(count, self.generator)
        ]

    def result(self) -> SpotChecks:
        """The values of all layers."""
        return SpotChecks(
            strata=make_strata(self.layers, self.pilot, self.main, self.steps.rounding_share)
        )


_STREAM = 0x2545F491
"""Combined with the seed by exclusive or, for the random numbers of spot checks."""
