"""The place of the batch in a tensor: its first dimension, its second, or folded into the first.

A layout is 0 or 1, the batch dimension, or "folded" for [B·k, ...], where a module sees the k parts
of each sample as separate samples. None: the batch cannot be located.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class BatchLayouts:
    """The layout of each module, decided once per model: a later shape cannot mislead.

    A batch of 8 sequences of 8 tokens fits two layouts. What the verified batch has decided is
    therefore used for all later ones.

    Attributes:
        of: Layout by module path.
        expand: Lookups whose index has no batch dimension, which is expanded to one. "leading": the
            index is [1, ...]; "missing": it is [...].
        refused: Lookups that must not be expanded, because that changed the outputs.
        settled: Whether the layouts have been verified and no new ones are decided.
    """

    of: dict[str, int | str] = field(default_factory=dict)
    expand: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    settled: bool = False


def has_batch(x: Tensor, layout: int | str | None, size: int) -> bool:
    """Whether ``x`` can hold a batch in this layout.

    Args:
        x: A tensor of any shape.
        layout: 0, 1, "folded" or None.
        size: Number of samples B.

    Returns:
        For 0 and 1, whether that dimension has B entries. For "folded", whether the size of the
        first of at least two dimensions is a positive multiple of B. Always False for None.
    """
    if layout == "folded":
        return x.dim() > 1 and x.shape[0] % size == 0 and x.shape[0] > 0
    return isinstance(layout, int) and x.dim() > layout and x.shape[layout] == size


def batch_first(x: Tensor, layout: int | str, size: int) -> Tensor:
    """Return ``x`` with the batch as its first dimension.

    Args:
        x: A tensor that holds the batch in this layout.
        layout: 0, 1 or "folded".
        size: Number of samples B.

    Returns:
        A view [B, ...]; [B, k, ...] of a folded tensor [B·k, ...].
    """
    if layout == "folded":
        return x.unflatten(0, (size, -1))
    return x.transpose(0, 1) if layout == 1 else x


def from_batch_first(x: Tensor, layout: int | str) -> Tensor:
    """Invert :func:`batch_first`.

    Args:
        x: A tensor [B, ...]; [B, k, ...] if folded.
        layout: The layout of the result: 0, 1 or "folded".
    """
    if layout == "folded":
        return x.flatten(0, 1)
    return x.transpose(0, 1) if layout == 1 else x


def broadcast_over_batch(factors: Tensor, x: Tensor, layout: int | str) -> Tensor:
    """Reshape one factor per sample so that it multiplies the samples of ``x``.

    Args:
        factors: [B].
        x: A tensor that holds the batch.
        layout: The place of the batch in ``x``.
    """
    if layout == "folded":
        return factors.repeat_interleave(x.shape[0] // len(factors)).view(-1, *[1] * (x.dim() - 1))
    leading = [1] * layout if isinstance(layout, int) else []
    return factors.view(*leading, -1, *[1] * (x.dim() - 1 - len(leading)))
