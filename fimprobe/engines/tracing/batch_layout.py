"""The place of the batch in the tensors of each module; see :mod:`fimprobe.model.sample_dimension`.

Rules read 0, 1 and "folded". None: the batch cannot be located.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fimprobe.model.sample_dimension import Layout, has_batch


@dataclass(kw_only=True)
class BatchLayouts:
    """The layout of each module, decided once per model: a later shape cannot mislead.

    A batch of 8 sequences of 8 tokens fits two layouts. Two forward passes of different sizes show
    which of them the model has; see :mod:`fimprobe.engines.tracing.layout_trace`.

    Attributes:
        traced: Whether two passes have shown the layouts. A model that runs with one size only has
            those that the shapes of its verified batch allow.
        of: Layout by module path; None where there is none.
        calls: For each module path, the calls that were seen, as plain values: the indices of the
            tensors among the leaves of their arguments; index and layout of those that hold the
            batch; the indices of those that are broadcast over it from a first dimension of length
            1; the layout of the outputs.
        expand: Lookups whose index has no batch dimension, which is expanded to one. "leading": the
            index is [1, ...]; "missing": it is [...].
        unsure: Paths at which the order of the samples is compared in every measurement, because
            shapes in the forward pass depend on data.
        settled: Whether the layouts have been verified and no new ones are decided.
    """

    traced: bool = False
    of: dict[str, Layout | None] = field(default_factory=dict)
    calls: dict[str, list[list[Any]]] = field(default_factory=dict)
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

    def batched_arguments(
        self, path: str, leaves: Sequence[object], size: int
    ) -> tuple[dict[int, Layout], Layout] | None:
        """Return where the arguments of a call hold the batch, and where its outputs do.

        Args:
            path: The path of the module that is called.
            leaves: All leaves of its arguments.
            size: Number of samples B.

        Returns:
            The layouts of the arguments by their indices among ``leaves``, and that of all outputs;
            None if the batch cannot be located.
        """
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        batched: dict[int, Layout] = {}
        of_outputs: Layout = 0
        if self.traced:
            seen = next((kind[1:] for kind in self.calls.get(path, []) if kind[0] == tensors), None)
            if seen is not None:
                pairs, broadcast, of_outputs = seen
                # what was broadcast over the samples may have a row for each of them in another batch
                wide = [i for i in broadcast if len(_tensor(leaves[i])) == size and size > 1]
                batched = dict(pairs) | dict.fromkeys(wide, 0)
        else:
            batched = {i: 0 for i in tensors if has_batch(_tensor(leaves[i]), 0, size)}
        fits = all(has_batch(_tensor(leaves[i]), layout, size) for i, layout in batched.items())
        return (batched, of_outputs) if batched and fits else None


def _tensor(x: object) -> Tensor:
    assert isinstance(x, Tensor)
    return x


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
