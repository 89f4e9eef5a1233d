"""One training batch as its forward pass received it, and what its backward passes revealed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe.training.backward_reach import Reach


class CapturedBatch:
    """Inputs of a training forward pass, with what the backward passes revealed.

    All tensors are the training's own, not copies. A step may make several backward passes through
    one forward (pieces of a sequence, several losses): gradients add up, positions are united. A pass
    with a larger ``Reach`` replaces what a pass with a smaller one left.

    Attributes:
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        reach: How far the gradients of the backward passes travelled.
        label_positions: Bool [B, T], True where the loss gradient is not zero; set if only the label
            mask is needed.
        has_positions: Whether an output [B, T, ...] is watched, whose positions may lack a label.
        gradient_arrived: Whether it arrived.
        hook: The hook on the outputs, which lives as long as their graph.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.reach = Reach.UNFINISHED
        self.label_positions: Tensor | None = None
        self.has_positions = False
        self.gradient_arrived = False
        self.hook: weakref.ref[Any] | None = None
        self._input_versions = _versions(args, kwargs)
        self._outputs: tuple[Tensor, int] | None = None
        self._outputs_changed_before_loss = False
        self._gradient: tuple[Tensor, int] | None = None
        self._gradient_overwritten = False
        self._gradient_reach = Reach.UNFINISHED

    @property
    def outputs(self) -> Tensor | None:
        """The watched outputs [B, ...]; None if not needed, or if written to after the forward."""
        if self._outputs is None or self.outputs_changed:
            return None
        return self._outputs[0]

    @outputs.setter
    def outputs(self, outputs: Tensor | None) -> None:
        self._outputs = None if outputs is None else (outputs, outputs._version)

    @property
    def outputs_changed(self) -> bool:
        """Whether the outputs were changed in place after the forward."""
        if self._outputs is None:
            return False
        return self._outputs_changed_before_loss or self._outputs[0]._version != self._outputs[1]

    @property
    def loss_used_changed_outputs(self) -> bool:
        """Whether they were changed before the loss, whose gradient then belongs to other values."""
        # an in-place operation on a view replaces the node of the hook: no gradient arrives
        without_gradient = self.outputs_changed and not self.gradient_arrived
        return self._outputs_changed_before_loss or without_gradient

    @property
    def gradient(self) -> Tensor | None:
        """The loss gradient at the outputs [B, ...], summed over the backward passes.

        None if no gradient arrived, or if it was overwritten.
        """
        if self._gradient_overwritten or self._gradient is None:
            return None
        gradient, version = self._gradient
        return gradient.detach() if gradient._version == version else None

    def accepts(self, reach: Reach) -> bool:
        """Return whether the gradient of a pass with this reach counts.

        What passes with a smaller reach left is forgotten first.
        """
        if reach > self._gradient_reach:
            self.label_positions = self._gradient = None
            self._gradient_overwritten = self.gradient_arrived = False
            self._gradient_reach = reach
        return reach == self._gradient_reach

    def store_gradient(self, gradient: Tensor) -> None:
        """Add the gradient [B, ...] of one backward pass at the outputs.

        The first is kept without a copy: the reference keeps autograd from reusing its memory.
        """
        self.gradient_arrived = True
        self._outputs_changed_before_loss = self.outputs_changed
        gradient = gradient.detach() if gradient.requires_grad else gradient
        if self._gradient is not None:
            previous = self.gradient
            self._gradient_overwritten = previous is None
            if previous is None:
                return
            gradient = previous + gradient
        self._gradient = (gradient, gradient._version)

    def graph_is_gone(self) -> bool:
        """Return whether the graph was freed before a backward pass went through it."""
        return self.reach is Reach.UNREACHED and self.hook is not None and self.hook() is None

    def unchanged(self) -> bool:
        """Return whether no input tensor was written to after the forward."""
        return self._input_versions == _versions(self.args, self.kwargs)

    def release(self) -> None:
        """Drop all references to tensors."""
        self.args, self.kwargs = (), {}
        self.label_positions = self._outputs = self._gradient = None


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the version counters of all tensors in the arguments."""
    return [
        x._version
        for x in tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and not x.is_inference()
    ]
