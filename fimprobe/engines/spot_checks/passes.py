"""Passes of spot checks: the unshifted one, and two for the checks of up to a number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.guard import ShiftGuard, compare_derivatives
from fimprobe.engines.spot_checks.held_kinks import CannotHold, HeldKinks
from fimprobe.engines.spot_checks.prefix import Prefix
from fimprobe.engines.spot_checks.quadratic import fisher_quadratic
from fimprobe.engines.spot_checks.shifted_calls import Steps
from fimprobe.engines.spot_checks.shifted_forward import ShiftedForward
from fimprobe.engines.spot_checks.slots import CheckedEntry, Slot
from fimprobe.engines.spot_checks.step_sizes import TARGET
from fimprobe.engines.tracing.plan import Plan

MAX_ROWS = 64
"""Rows of a pass, where a batch of fewer inputs was not cut into chunks."""

CACHE_SHARE = 0.25
"""Share of the memory limit for outputs that are kept between passes."""


@dataclass(kw_only=True)
class SpotPasses:
    """Runs checks.

    Attributes:
        problem: The measurement.
        plan: A verified plan.
        kinds: Kind of each layer.
        dtype: The coarsest type of the computation.
        generator: Source of random numbers.
        guard: Notes checks to be compared.
        forward: Runs shifted passes.
        prefix: Order of calls, and outputs of blocks.
        rows: Most rows of a pass.
        outputs: Unshifted h of the whole batch; None if every pass computes its own.
        compares_derivatives: Whether differences are compared with autograd's derivatives.
        sizes: Squared sizes of the outputs' rounding errors, by the place of the input.
    """

    problem: Problem
    plan: Plan
    kinds: Mapping[str, str]
    dtype: torch.dtype
    generator: torch.Generator
    guard: ShiftGuard
    forward: ShiftedForward = field(init=False)
    prefix: Prefix = field(init=False)
    rows: int = field(init=False)
    outputs: Tensor | None = None
    compares_derivatives: bool = False
    sizes: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare the forward passes."""
        self.forward = ShiftedForward(self.problem, self.plan)
        self.prefix = Prefix(twin=self.problem.twin)
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

    def check(self, slots: Sequence[Slot], eta: Sequence[float]) -> list[CheckedEntry]:
        """Run checks; those whose shifts begin late share passes with a long prefix.

        Args:
            slots: The checks.
            eta: η of each.

        Returns:
            The results, in another order.
        """
        users, first = self.forward.users, self.prefix.first_call
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
            kind = f"{self.kinds[slot.layer]} {local}"
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
        size = self._sizes_of(rows, h)
        squared_step = steps.values.square()
        values = quadratic / squared_step.square().where(squared_step > 0, 1)
        values = values.where(squared_step > 0, 0)
        relative = (quadratic / size.clamp(min=1e-300)).sqrt()
        # no use of the entry has an effect: zero, and no step would change that
        relative = relative.where(squared_step > 0, TARGET[self.dtype])
        numbers = [x.double() for x in (quadratic, values, relative, steps.eta)]
        squares, *of_checks = torch.stack(numbers).tolist()  # one transfer
        if not all(map(math.isfinite, squares)):
            raise CannotHold("the outputs are not finite at slightly shifted parameters")
        return [
            CheckedEntry(slot=slot, value=value * slot.weight, difference=rho, eta=eta)
            for slot, value, rho, eta in zip(slots, *of_checks, strict=True)
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
