"""Number of optimizer steps that the device skips, counted without synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_SEPARATE_STEPS = 256
"""Flags kept one by one; then they are added up on the device. Bounds the memory of a long run."""


class SkippedSteps:
    """Counts the recorded steps that were skipped.

    GradScaler's ``found_inf``, a tensor on the device, makes a fused optimizer skip a step. Reading
    it at every step would synchronise host and device. The flags therefore stay on the device until
    ``count`` is called.

    >>> skips = SkippedSteps()
    >>> for found_inf in (0.0, 1.0, 0.0):
    ...     skips.record(torch.tensor(found_inf), same=False)
    >>> skips.count(), skips.count()
    (1, 0)
    """

    def __init__(self) -> None:
        self._flags: list[Tensor] = []
        self._last: Tensor | None = None

    def __bool__(self) -> bool:
        """Return whether any step may have been skipped since the last ``count``."""
        return self._last is not None or bool(self._flags)

    def record(self, found_inf: Any, *, same: bool) -> None:
        """Record the step of an optimizer.

        Args:
            found_inf: Flag, not zero if the step is skipped; None if it is never skipped.
            same: Whether it uses the batch of the previous step. The two then count as one step,
                which is skipped if both are.
        """
        # the comparison copies: GradScaler.update() adds the flags of other optimizers in place
        skipped = None if found_inf is None else torch.as_tensor(found_inf) != 0
        if same:
            if self._last is not None:
                self._last = None if skipped is None else self._last & skipped
            return
        if self._last is not None:
            self._flags.append(self._last)
        self._last = skipped
        if len(self._flags) == MAX_SEPARATE_STEPS:
            self._flags = [torch.stack([flag.long() for flag in self._flags]).sum()]

    def count(self) -> int:
        """Return how many steps were skipped since the last call.

        Synchronises with the device if any flag was recorded.
        """
        flags = [*self._flags, *([] if self._last is None else [self._last])]
        self.clear()
        return int(torch.stack([flag.long() for flag in flags]).sum()) if flags else 0

    def clear(self) -> None:
        """Forget the recorded steps."""
        self._flags, self._last = [], None
