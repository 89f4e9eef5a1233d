"""Where a tensor keeps the batch: in its first dimension, in its second, or folded into the first."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class BatchLayouts:
    """Where each module keeps the batch, decided once per model so that no shape can mislead later.

    0 and 1 are dimensions, "folded" is [B·k, ...]. ``expand`` names lookups whose index has no
    batch dimension and is expanded to one.
    """

    of: dict[str, int | str] = field(default_factory=dict)
    expand: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    settled: bool = False


def fits(x: Tensor, layout: int | str | None, size: int) -> bool:
    """Whether ``x`` can hold a batch of ``size`` in this layout."""
    if layout == "folded":
        return x.dim() > 1 and x.shape[0] % size == 0 and x.shape[0] > 0
    return isinstance(layout, int) and x.dim() > layout and x.shape[layout] == size


def batch_first(x: Tensor, layout: int | str, size: int) -> Tensor:
    """``x`` with the batch as its first dimension."""
    if layout == "folded":
        return x.unflatten(0, (size, -1))
    return x.transpose(0, 1) if layout == 1 else x


def from_batch_first(x: Tensor, layout: int | str) -> Tensor:
    """The inverse of :func:`batch_first`."""
    if layout == "folded":
        return x.flatten(0, 1)
    return x.transpose(0, 1) if layout == 1 else x


def broadcast_over_batch(factors: Tensor, x: Tensor, layout: int | str) -> Tensor:
    """``factors`` [B] in a shape that multiplies the samples of ``x``."""
    if layout == "folded":
        return factors.repeat_interleave(x.shape[0] // len(factors)).view(-1, *[1] * (x.dim() - 1))
    lead = [1] * layout if isinstance(layout, int) else []
    return factors.view(*lead, -1, *[1] * (x.dim() - 1 - len(lead)))
