"""Comparison of shifted passes with single samples, whose parameters are shifted themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.held_kinks import CannotHold
from fimprobe.engines.spot_checks.shifted_forward import ShiftedForward
from fimprobe.engines.spot_checks.slots import Slot

TOLERANCE, TOLERANCE_WITH_KINKS = 0.02, 0.3
"""Difference allowed, over the largest change of an output. Single samples do not hold kinks."""

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
        share = TOLERANCE if forward.kinks is None else TOLERANCE_WITH_KINKS
        for slot, step, (h, change) in self.noted.values():
            if step == 0:
                continue
            data = problem.parameters[slot.parameter].data
            index = torch.unravel_index(torch.tensor(slot.entry), data.shape)
            original = data[index].clone()
            try:
                data[index] = original + step
                alone = forward.plain_outputs(problem.batch[slot.row : slot.row + 1])[0]
            finally:
                data[index] = original
            error = float((alone - h - change).abs().max())
            rounding = ROUNDINGS * torch.finfo(h.dtype).eps * float(h.abs().max())
            if error > share * float(change.abs().max()) + rounding:
                raise CannotHold(
                    f"guard: a forward pass with shifts of {slot.parameter!r} does not agree with "
                    "that of a single sample. Please report this, with the model"
                )
