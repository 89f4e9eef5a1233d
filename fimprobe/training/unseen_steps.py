"""Steps of loops that no optimizer of torch makes: parameters that change between two forwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fimprobe.model.fsdp.placement import is_part

UNSEEN_STEPS = 3
"""Changes of the parameters without a step of an optimizer after which such changes are steps."""

MAX_SAMPLED_PARAMETERS = 4
MAX_SAMPLED_ENTRIES = 64
"""Values that are compared: writes through ``p.data`` do not count in the version of ``p``."""

UNSEEN_WARNING = (
    "the parameters change, but no step of a torch optimizer was seen (a hand-written update, an "
    "optimizer of another library, or one whose step is compiled): from now on, every change between "
    "two training forwards counts as one step, which is measured after it. Call probe.step() between "
    "backward and the change of the parameters, outside of compiled functions, to have it measured "
    "before"
)
LATE_NOTE = (
    "No step of a torch optimizer was seen. The batch was measured when the next forward began, at "
    "the parameters after its step; call probe.step() before they change to have it measured before."
)
NEVER_STEPPED = (
    "nothing was measured: {forwards} training batches went forward, but no step was seen. Steps are "
    "those of the torch optimizers that hold the model's parameters, or of the one passed as "
    "`optimizer`. In other loops (updates written by hand, optimizers of other libraries, compiled "
    "or functional ones) call probe.step() between backward and the change of the parameters; where "
    "these are arguments of the forward (torch.func), call fimprobe.measure with a model that holds "
    "them"
)


class UnseenSteps:
    """Notices that parameters change without a step of an optimizer.

    Args:
        counts_changes: Whether such changes may be steps; otherwise only forwards are counted.

    Attributes:
        forwards: Training forwards so far.
        count: Changes of the parameters between two of them.
    """

    def __init__(self, *, counts_changes: bool = True) -> None:
        self.forwards = self.count = 0
        self._counts_changes = counts_changes
        self._versions: dict[int, int] = {}
        self._values: dict[int, Tensor] = {}

    def begin_forward(self, model: nn.Module, *, nested: bool) -> int:
        """Count a training forward, and the steps before it that no optimizer made.

        Args:
            model: The model, at the beginning of the forward.
            nested: Whether the forward is part of one that has not returned yet.

        Returns:
            The number of steps to count now: none before the third change of the parameters, three
            at that one, and one at each later change.
        """
        self.forwards += 1
        if nested or not self._observe_change(model) or self.count < UNSEEN_STEPS:
            return 0
        return UNSEEN_STEPS if self.count == UNSEEN_STEPS else 1

    def record(self, model: nn.Module) -> None:
        """Record the parameters; after a forward its own writes to them are no change."""
        if self._counts_changes and not _are_arguments(model):
            self._versions = {id(p): p._version for p in model.parameters() if p.requires_grad}
            self._values = {key: x.clone() for key, x in _sample(model).items()}

    def _observe_change(self, model: nn.Module) -> bool:
        """Return whether a parameter changed since the last record, and record them.

        Args:
            model: The model, at the beginning of a training forward.
        """
        if not self._counts_changes or _are_arguments(model):
            return False
        # what is frozen by now, or was so far, is no step's
        changed = any(
            self._versions.get(id(p), p._version) != p._version for p in model.parameters()
        ) or any(
            key in self._values and _differ(x, self._values[key]) for key, x in _sample(model).items()
        )
        self.count += changed
        self.record(model)
        return changed


def _are_arguments(model: nn.Module) -> bool:
    """Return whether the parameters are arguments of ``torch.func.functional_call``."""
    return not all(isinstance(p, nn.Parameter) for p in model.parameters())


def _differ(x: Tensor, recorded: Tensor) -> bool:
    """Return whether values changed; a model that was moved or cast made no step."""
    comparable = x.device == recorded.device and x.dtype == recorded.dtype
    return comparable and not torch.equal(x, recorded)


def _sample(model: nn.Module) -> dict[int, Tensor]:
    """Return some entries of some trainable parameters, by their identity."""
    whole = [p for p in model.parameters() if p.requires_grad and not is_part(p) and p.numel()]
    sampled = {}
    for p in whole[:: max(1, len(whole) // MAX_SAMPLED_PARAMETERS)][:MAX_SAMPLED_PARAMETERS]:
        flat = p.detach().reshape(-1)
        entries = flat[:: max(1, len(flat) // MAX_SAMPLED_ENTRIES)][:MAX_SAMPLED_ENTRIES]
        sampled[id(p)] = entries
    return sampled
