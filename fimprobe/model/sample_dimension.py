"""The place of the samples in a tensor: one of its dimensions, or folded into the first.

A layout is the batch dimension, or "folded" for [B·k, ...], where a module sees the k parts of each
sample as separate samples.
"""

from __future__ import annotations

from torch import Tensor

Layout = int | str
"""The batch dimension, or "folded"."""


def has_batch(x: Tensor, layout: Layout | None, size: int) -> bool:
    """Whether ``x`` can hold a batch in this layout.

    Args:
        x: A tensor of any shape.
        layout: The layout, or None.
        size: Number of samples B.

    Returns:
        For a dimension, whether it has B entries. For "folded", whether the size of the first of at
        least two dimensions is a positive multiple of B. Always False for None.
    """
    if layout == "folded":
        return x.dim() > 1 and x.shape[0] % size == 0 and x.shape[0] > 0
    return isinstance(layout, int) and x.dim() > layout and x.shape[layout] == size


def batch_first(x: Tensor, layout: Layout, size: int) -> Tensor:
    """Return ``x`` with the batch as its first dimension.

    Args:
        x: A tensor that holds the batch in this layout.
        layout: The layout.
        size: Number of samples B.

    Returns:
        A view [B, ...]; [B, k, ...] of a folded tensor [B·k, ...].
    """
    if layout == "folded":
        return x.unflatten(0, (size, -1))
    return x.movedim(layout, 0) if isinstance(layout, int) and layout else x


def from_batch_first(x: Tensor, layout: Layout) -> Tensor:
    """Invert :func:`batch_first`.

    Args:
        x: A tensor [B, ...]; [B, k, ...] if folded.
        layout: The layout of the result.
    """
    if layout == "folded":
        return x.flatten(0, 1)
    return x.movedim(0, layout) if isinstance(layout, int) and layout else x
