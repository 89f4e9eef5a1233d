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
from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.allocation import (
    PILOT,
    SLOTS_PER_INPUT,
    SLOTS_PER_LAYER,
    allot,
    num_checks_at_least,
    relative_variances,
)
from fimprobe.engines.spot_checks.guard import ShiftGuard, compare_derivatives
from fimprobe.engines.spot_checks.held_kinks import CannotHold, HeldKinks
from fimprobe.engines.spot_checks.prefix import Prefix
from fimprobe.engines.spot_checks.proposals import LayerProposal
from fimprobe.engines.spot_checks.quadratic import fisher_quadratic
from fimprobe.engines.spot_checks.shifted_calls import Steps
from fimprobe.engines.spot_checks.shifted_forward import ShiftedForward
from fimprobe.engines.spot_checks.slots import CheckedEntry, Slot, make_strata
from fimprobe.engines.spot_checks.steering import note_checks, share_by_kind, share_by_layer
from fimprobe.engines.spot_checks.step_sizes import TARGET, StepSizes
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.spot_history import SpotHistory
from fimprobe.statistics import SpotChecks

PILOT_REPEATS, MAIN_REPEATS = 2, 1
"""Times that a check is repeated with another step at most."""

MAX_ROWS = 64
"""Rows of a pass, where a batch of fewer inputs was not cut into chunks."""

CACHE_SHARE = 0.25
"""Share of the memory limit for outputs that are kept between passes."""


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
    with checker.forward.exact_kernels():
        checker.record_baseline()
        limit = max(
            SLOTS_PER_INPUT * problem.batch.size, SLOTS_PER_LAYER * len(layers), checker.least
        )
        known = plan.spot_history.covers(n for p in layers.values() for n in p.parameters)
        if not known:
            checker.run_pilot()
            limit -= PILOT * len(layers)
        checker.run_main(limit)
        checker.guard.compare(problem, checker.forward)
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
        forward: Runs shifted passes.
        prefix: Order of calls, and outputs of blocks.
        outputs: Unshifted h of the whole batch; None if every pass computes its own.
        compares_derivatives: Whether differences are compared with autograd's derivatives.
    """

    problem: Problem
    plan: Plan
    layers: Mapping[str, LayerProposal]
    dtype: torch.dtype
    forward: ShiftedForward = field(init=False)
    prefix: Prefix = field(init=False)
    outputs: Tensor | None = None
    compares_derivatives: bool = False
    pilot: dict[str, list[CheckedEntry]] = field(default_factory=dict)
    main: dict[str, list[CheckedEntry]] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)
    guard: ShiftGuard = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the forward passes."""
        self.forward = ShiftedForward(self.problem, self.plan)
        self.prefix = Prefix(twin=self.problem.twin)
        self.history = self.plan.spot_history
        self.least = num_checks_at_least(sum(p.numel() for p in self.problem.parameters.values()))
        self.steps = StepSizes(self.dtype, self.history.etas)
        self.generator = torch.Generator().manual_seed(self.problem.draws.seed ^ _STREAM)
        known = sorted(self.history.guarded)
        self.guard = ShiftGuard(known=set(known))
        if known:
            place = int(torch.randint(len(known), (1,), generator=self.generator))
            self.guard.again = known[place]
        size = self.problem.batch.size
        chunked = self.plan.chunk_size is not None and self.plan.chunk_size < size
        # without a graph a row takes a fraction of the memory that it takes in other passes
        more = max(size, min(4 * size, MAX_ROWS))
        self.rows = min(self.plan.chunk_size or more, more) if chunked else more

    def record_baseline(self) -> None:
        """Run the unshifted passes: outputs, the order of calls, and whether there are kinks."""
        size = self.problem.batch.size
        kinks = HeldKinks()
        self.forward.kinks = kinks
        with self.prefix.recorded(1, keep_outputs=False):
            h = self.forward.run(torch.arange(1))
        self.forward.kinks = kinks if kinks.branches else None
        limit = CACHE_SHARE * self.problem.memory_mb * 2**20
        keep = 2 * h.numel() * h.element_size() * size <= limit and not kinks.branches
        outputs: list[Tensor] = []
        for start in range(0, size, self.rows):
            rows = torch.arange(start, min(start + self.rows, size))
            share = limit / 2 * len(rows) / size * (len(outputs) + 1)
            if not keep and self.prefix.num_bytes() > share:
                break
            paused, self.forward.kinks = self.forward.kinks, None
            with self.prefix.recorded(len(rows), keep_outputs=not self.plan.takes_derivatives):
                outputs.append(self.forward.run(rows))
            self.forward.kinks = paused
            if self.prefix.num_bytes() > share:
                self.prefix.outputs.clear()
                break
        complete = sum(map(len, outputs)) == size
        if not complete:
            self.prefix.outputs.clear()
        self.outputs = torch.cat(outputs) if keep and complete else None

    def run_pilot(self) -> None:
        """Run a few checks of each layer, which show the step sizes and where V2 is."""
        slots = [slot for layer in self.layers for slot in self._draw(layer, PILOT)]
        self.compares_derivatives = True
        values = self.check(slots)
        self.compares_derivatives = False
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
        kinds = {layer: proposal.kind for layer, proposal in self.layers.items()}
        means = {
            layer: sum(steering.values.get(n, 0.0) for n in proposal.parameters)
            for layer, proposal in self.layers.items()
        }
        counts = allot(means, relative_variances(steering, kinds), limit, self.least)
        slots = [slot for layer in self.layers for slot in self._draw(layer, counts[layer])]
        for value in self.settle(self.check(slots), MAIN_REPEATS):
            self.main.setdefault(value.slot.layer, []).append(value)

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
            values += self.check([v.slot for v in poor], eta)
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

    def check(self, slots: Sequence[Slot], eta: Sequence[float] | None = None) -> list[CheckedEntry]:
        """Run checks in passes; those whose shifts begin late share passes with a long prefix.

        Args:
            slots: The checks.
            eta: η of each; by default that of its parameter.

        Returns:
            The results, in another order.
        """
        users, first = self.forward.users, self.prefix.first_call
        if eta is None:
            eta = [self.steps[slot.parameter] for slot in slots]
        pairs = zip(slots, eta, strict=True)
        ordered = sorted(pairs, key=lambda pair: first(users[pair[0].parameter]))
        values = []
        for start in range(0, len(ordered), self.rows):
            part = ordered[start : start + self.rows]
            values += self._run_pass([slot for slot, _ in part], [e for _, e in part])
        return values

    def _run_pass(self, slots: Sequence[Slot], eta: Sequence[float]) -> list[CheckedEntry]:
        """Run one pass: two shifted forwards, after an unshifted one if that is not known."""
        rows = torch.tensor([slot.row for slot in slots])
        kinks, device = self.forward.kinks, next(iter(self.problem.parameters.values())).device
        steps = Steps.of(eta, device, kinks)
        if self.outputs is not None:
            h = self.outputs[rows]
        else:
            if kinks is not None:
                kinks.restart()
            steps.sign = 0.0
            h = self.forward.run(rows, slots, steps, self.prefix)
            steps.deciding = False
        changes = self._shift_both_ways(slots, rows, h, steps)
        noted, moved = steps, changes
        if self.compares_derivatives:
            noted = steps.shrunk(h, changes[0])
            moved = self._shift_both_ways(slots, rows, h, noted)
            compare_derivatives(self.forward, self.prefix, slots, h, moved, noted)
        self._note_for_guard(slots, h, moved[0], noted)
        return self._values(slots, rows, h, changes[0].add_(changes[1]), steps)

    def _shift_both_ways(
        self, slots: Sequence[Slot], rows: Tensor, h: Tensor, steps: Steps
    ) -> list[Tensor]:
        """Changes of the outputs h [n, ...] of a pass by the shifts and by their opposites."""
        changes = []
        for sign in (1.0, -1.0):
            if steps.kinks is not None:
                steps.kinks.follow()
            steps.sign = sign
            changes.append(self.forward.run(rows, slots, steps, self.prefix).sub_(h))
            steps.deciding = False
        return changes

    def _note_for_guard(self, slots: Sequence[Slot], h: Tensor, moved: Tensor, steps: Steps) -> None:
        """Note one check of each kind of parameter, with what its shift has changed."""
        for row, slot in enumerate(slots):
            local = slot.parameter.rpartition(".")[2]
            kind = f"{self.layers[slot.layer].kind} {local}"
            if self.guard.wants(kind):
                step = float(steps.values[row])
                self.guard.note(kind, slot, step, (h[row].clone(), moved[row].clone()))

    def _values(
        self,
        slots: Sequence[Slot],
        rows: Tensor,
        h: Tensor,
        difference: Tensor,
        steps: Steps,
    ) -> list[CheckedEntry]:
        """What the second differences [n, ...] of one pass show."""
        mask = None if self.problem.mask is None else self.problem.mask[rows]
        quadratic = fisher_quadratic(self.problem.likelihood, h, difference, mask)
        if not bool(torch.isfinite(quadratic).all()):
            raise CannotHold("the outputs are not finite at slightly shifted parameters")
        size = self._sizes_of(rows, h)
        squared_step = steps.values.square()
        values = quadratic / squared_step.square().where(squared_step > 0, 1)
        values = values.where(squared_step > 0, 0)
        relative = (quadratic / size.clamp(min=1e-300)).sqrt()
        # no use of the entry has an effect: zero, and no step would change that
        relative = relative.where(squared_step > 0, TARGET[self.dtype])
        return [
            CheckedEntry(slot=slot, value=value * slot.weight, difference=rho, eta=eta)
            for slot, value, rho, eta in zip(
                slots, values.tolist(), relative.tolist(), steps.eta.tolist(), strict=True
            )
        ]

    def _sizes_of(self, rows: Tensor, h: Tensor) -> Tensor:
        """Squared size of the outputs' rounding errors [n], over that of the machine precision.

        Errors have random signs: those common to all classes would not count for a softmax.
        """
        missing = [i for i, row in enumerate(rows.tolist()) if row not in self.sizes]
        if missing:
            index = torch.tensor(missing)
            at = rows[index]
            mask = None if self.problem.mask is None else self.problem.mask[at]
            signs = torch.randint(0, 2, h.shape[1:], generator=self.generator).mul_(2).sub_(1)
            signed = h[index] * signs.to(h.device, h.dtype)
            sizes = fisher_quadratic(self.problem.likelihood, h[index], signed, mask)
            self.sizes.update(zip(at.tolist(), sizes.unbind(), strict=True))
        return torch.stack([self.sizes[row] for row in rows.tolist()])

    def result(self) -> SpotChecks:
        """The values of all layers."""
        return SpotChecks(
            strata=make_strata(self.layers, self.pilot, self.main, self.steps.rounding_share)
        )


_STREAM = 0x2545F491
"""Combined with the seed by exclusive or, for the random numbers of spot checks."""
