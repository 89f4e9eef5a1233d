"""The place of the batch in a tensor: its first dimension, its second, or folded into the first.

A layout is 0 or 1, the batch dimension, or "folded" for [B·k, ...], where a module sees the k parts
of each sample as separate samples. None: the batch cannot be located.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

Layout = int | str
"""0 or 1, the batch dimension, or "folded"."""


@dataclass(kw_only=True)
class BatchLayouts:
    """The layout of each module, decided once per model: a later shape cannot mislead.

    A batch of 8 sequences of 8 tokens fits two layouts. Two forward passes of different sizes show
    which of them the model has; see :mod:`fimprobe.engines.tracing.layout_trace`.

    Attributes:
        traced: Whether two passes have shown the layouts. A model that runs with one size only has
            those that the shapes of its verified batch allow.
        of: Layout by module path; None where there is none.
        calls: For each module path, the calls that were seen: the indices of the tensors among the
            leaves of their arguments, of those that hold the batch in their first dimension, and of
            those that are broadcast over it from a first dimension of length 1.
        expand: Lookups whose index has no batch dimension, which is expanded to one. "leading": the
            index is [1, ...]; "missing": it is [...].
        unsure: Paths at which the order of the samples is compared in every measurement, because
            shapes in the forward pass depend on data.
        settled: Whether the layouts have been verified and no new ones are decided.
    """

    traced: bool = False
    of: dict[str, Layout | None] = field(default_factory=dict)
    calls: dict[str, list[list[list[int]]]] = field(default_factory=dict)
    expand: dict[str, str] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    settled: bool = False

    def layout(self, path: str, tensors: Sequence[Tensor], size: int) -> Layout | None:
        """Return the layout in which all tensors of a module hold the batch; None if there is none.

        Args:
            path: The module's path.
            tensors: The inputs and outputs that its rules read.
            size: Number of samples B.
        """
        known = self.of.get(path)
        if known is None and (self.traced or self.settled):
            return None  # no batch there, or the module did not run when the layouts were decided
        candidates: list[Layout] = [0, 1, "folded"] if known is None else [known]
        for layout in candidates:
            if all(has_batch(x, layout, size) for x in tensors):
                self.of.setdefault(path, layout)
                return layout
        return None

    def batched_arguments(self, path: str, leaves: Sequence[object], size: int) -> set[int] | None:
        """Return which arguments of a call hold the batch in their first dimension.

        Args:
            path: The path of the module that is called.
            leaves: All leaves of its arguments.
            size: Number of samples B.

        Returns:
            Indices among ``leaves``; None if the batch lies elsewhere, or nowhere.
        """
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        if self.traced:
            seen = [kind[1:] for kind in self.calls.get(path, []) if kind[0] == tensors]
            batched = set(seen[0][0]) if seen else set()
            # what was broadcast over the samples may have a row for each of them in another batch
            wide = [i for i in seen[0][1] if len(_tensor(leaves[i])) == size] if seen else []
            batched |= set(wide) if size > 1 else set()
        else:
            batched = {i for i in tensors if has_batch(_tensor(leaves[i]), 0, size)}
        fits = all(has_batch(_tensor(leaves[i]), 0, size) for i in batched)
        return batched if batched and fits else None


def _tensor(x: object) -> Tensor:
    assert isinstance(x, Tensor)
    return x


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
