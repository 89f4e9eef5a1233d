"""Optimizer steps that are not made after all, counted without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FOLD = 256
"""Steps whose answers are kept one by one."""


class SkippedSteps:
    """How many of the steps noted were skipped.

    A fused optimizer is told by GradScaler's ``found_inf``, a tensor on the device, to leave a step
    out. To read it at every step would have the host wait for the device at every step: the answers
    stay where they are until ``settle``.

    >>> skips = Skips()
    >>> for found_inf in (0.0, 1.0, 0.0):
    ...     skips.note(torch.tensor(found_inf), same=False)
    >>> skips.settle(), skips.settle()
    (1, 0)
    """

    def __init__(self) -> None:
        self._told: list[Tensor] = []
        self._last: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to settle."""
        return self._last is not None or bool(self._told)

    def note(self, found_inf: Any, *, same: bool) -> None:
        """One more optimizer's step; None: it is made in any case.

        ``same``: of the batch of the one before: the two count once, as skipped if both are.
        """
        # a copy: GradScaler.update() adds the other optimizers' into the first one's
        skipped = None if found_inf is None else torch.as_tensor(found_inf) != 0
        if same:
            if self._last is not None:
                self._last = None if skipped is None else self._last & skipped
            return
        if self._last is not None:
            self._told.append(self._last)
        self._last = skipped
        if len(self._told) == FOLD:
            self._told = [torch.stack([t.long() for t in self._told]).sum()]

    def settle(self) -> int:
        """How many were skipped since the last call; waits for the device where any were noted."""
        told = [*self._told, *([] if self._last is None else [self._last])]
        self.clear()
        return int(torch.stack([t.long() for t in told]).sum()) if told else 0

    def clear(self) -> None:
        """Forget them."""
        self._told, self._last = [], None
