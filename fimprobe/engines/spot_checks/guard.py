"""Comparison of shifted passes with single samples, whose parameters are shifted themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.held_kinks import CannotHold
from fimprobe.engines.spot_checks.prefix import Prefix
from fimprobe.engines.spot_checks.shifted_calls import Steps
from fimprobe.engines.spot_checks.shifted_forward import ShiftedForward
from fimprobe.engines.spot_checks.slots import Slot

TOLERANCE, TOLERANCE_WITH_KINKS = 0.02, 0.3
"""Difference allowed, over the largest change of an output. Single samples do not hold kinks."""

DERIVATIVE_TOLERANCE = 0.2
"""Relative difference allowed between a difference of outputs and autograd's derivative."""

SMALLEST_CHANGE = 1e4
"""Change of the outputs that is compared, in units of their rounding."""

STOPPED_GRADIENT = (
    "differences of the forward are not the derivatives of its backward pass: a gradient is stopped "
    "or replaced, as by detach() or a custom autograd function"
)

SMALLER_STEP = 1 / 32
"""Share of a step at which a sample with kinks is compared again."""

ROUNDINGS = 200
"""Difference allowed, in units of the machine precision of the largest output."""


@dataclass(kw_only=True)
class ShiftGuard:
    """One check of each kind of parameter that is new to the plan, and of one other kind.

    Attributes:
        known: Kinds that were compared in earlier measurements.
        again: The kind among them that is compared again.
        noted: For each kind the check, its step, the outputs and their change.
    """

    known: set[str] = field(default_factory=set)
    again: str = ""
    noted: dict[str, tuple[Slot, float, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def wants(self, kind: str) -> bool:
        """Whether a check of this kind is to be noted."""
        return kind not in self.noted and (kind not in self.known or kind == self.again)

    def note(self, kind: str, slot: Slot, step: float, outputs: tuple[Tensor, Tensor]) -> None:
        """Keep a check for the comparison.

        Args:
            kind: The kind of its parameter.
            slot: The check.
            step: Its step.
            outputs: The unshifted outputs of its row, and their change by the shift.
        """
        self.noted[kind] = slot, step, outputs

    def compare(self, problem: Problem, forward: ShiftedForward) -> None:
        """Compare all noted checks with the model itself at the shifted parameter.

        Args:
            problem: The measurement; its parameters are restored.
            forward: The shifted passes.

        Raises:
            CannotHold: If one of them differs.
        """
        # at a smaller step, the sample is less likely to cross a kink that the shifted pass holds
        fractions = (1.0,) if forward.kinks is None else (1.0, SMALLER_STEP)
        for slot, step, (h, change) in self.noted.values():
            if step != 0 and not any(
                _agrees(problem, forward, slot, step * x, (h, change * x)) for x in fractions
            ):
                raise CannotHold(
                    f"guard: a forward pass with shifts of {slot.parameter!r} does not agree with "
                    "that of a single sample. Please report this, with the model"
                )


def _agrees(
    problem: Problem,
    forward: ShiftedForward,
    slot: Slot,
    step: float,
    outputs: tuple[Tensor, Tensor],
) -> bool:
    """Whether a single sample with a shifted parameter has the outputs of a shifted pass.

    Args:
        problem: The measurement; its parameters are restored.
        forward: The shifted passes.
        slot: The check.
        step: The shift of its entry.
        outputs: The unshifted outputs of its row, and their change by the shift.
    """
    h, change = outputs
    data = problem.parameters[slot.parameter].data
    index = torch.unravel_index(torch.tensor(slot.entry), data.shape)
    original = data[index].clone()
    try:
        data[index] = original + step
        alone = forward.plain_outputs(problem.batch[slot.row : slot.row + 1])[0]
    finally:
        data[index] = original
    share = TOLERANCE if forward.kinks is None else TOLERANCE_WITH_KINKS
    error = float((alone - h - change).abs().max())
    rounding = ROUNDINGS * torch.finfo(h.dtype).eps * float(h.abs().max())
    return error <= share * float(change.abs().max()) + rounding


def compare_derivatives(
    forward: ShiftedForward,
    prefix: Prefix,
    slots: Sequence[Slot],
    h: Tensor,
    changes: Sequence[Tensor],
    steps: Steps,
) -> None:
    """Compare central differences of one pass with autograd's derivatives along the same shifts.

    A forward with a stopped gradient depends on an entry in ways of which Î₁ and Î₂ know nothing.

    Args:
        forward: The shifted passes.
        prefix: Outputs of modules that finish before the first shift.
        slots: The checks of the pass.
        h: The unshifted outputs [n, ...].
        changes: Those of ``h`` by small steps and by their opposites.
        steps: The small steps.

    Raises:
        CannotHold: If they differ.
    """
    most = forward.plan.chunk_size or forward.problem.batch.size
    kinks, forward.kinks = forward.kinks, None
    try:
        for start in range(0, len(slots), most):
            rows = slice(start, start + most)
            parts = [change[rows] for change in changes]
            if _differs(forward, prefix, slots[rows], h[rows], parts, steps.values[rows]):
                raise CannotHold(STOPPED_GRADIENT)
    finally:
        forward.kinks = kinks


def _differs(
    forward: ShiftedForward,
    prefix: Prefix,
    slots: Sequence[Slot],
    h: Tensor,
    changes: Sequence[Tensor],
    step: Tensor,
) -> bool:
    moved = (changes[0] - changes[1]).detach().flatten(1).double()
    rounding = torch.finfo(h.dtype).eps * h.flatten(1).double().norm(dim=1)
    compared = (step != 0) & (moved.norm(dim=1) > SMALLEST_CHANGE * rounding)
    slope = moved / (2 * step.where(step != 0, 1)).unsqueeze(1)
    values = torch.zeros_like(step).requires_grad_()
    trial = Steps(eta=values.detach(), values=values, deciding=False)
    with torch.enable_grad():
        outputs = forward.run(
            torch.tensor([slot.row for slot in slots]), slots, trial, prefix, keep_graph=True
        )
        if not outputs.requires_grad or not trial.differentiable:
            return False
        along = (outputs.flatten(1).double() * slope).sum()
        (derivative,) = torch.autograd.grad(along, values, allow_unused=True)
    known = trial.differentiable - trial.evaluated
    compared &= torch.tensor([row in known for row in range(len(slots))], device=step.device)
    expected = slope.square().sum(1)
    derivative = torch.zeros_like(expected) if derivative is None else derivative
    error = (derivative - expected).abs()
    return bool((compared & (error > DERIVATIVE_TOLERANCE * expected)).any())
