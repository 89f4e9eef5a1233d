"""One training batch as its forward pass received it, and what its backward passes revealed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe.training.capture.backward_reach import Reach
from fimprobe.training.capture.captured_output import CapturedOutput


class CapturedBatch:
    """Inputs of a training forward pass, with what the backward passes revealed.

    All tensors are the training's own, not copies.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        reach: How far the gradients of the backward passes travelled.
        heads: The outputs that are watched, by the path of ``named_outputs``; "" is the only one.
        hook: The hook on the outputs, which lives as long as their graph.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.reach = Reach.UNFINISHED
        self.heads: dict[str, CapturedOutput] = {}
        self.hook: weakref.ref[Any] | None = None
        self._input_versions = _versions(args, kwargs)

    def graph_is_gone(self) -> bool:
        """Return whether the graph was freed before a backward pass went through it."""
        return self.reach is Reach.UNREACHED and self.hook is not None and self.hook() is None

    def unchanged(self) -> bool:
        """Return whether no input tensor was written to after the forward."""
        return self._input_versions == _versions(self.args, self.kwargs)

    def release(self) -> None:
        """Drop all references to tensors."""
        self.args, self.kwargs = (), {}
        for head in self.heads.values():
            head.release()


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the version counters of all tensors in the arguments."""
    return [
        x._version
        for x in tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and not x.is_inference()
    ]
