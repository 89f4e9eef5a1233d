"""One output of a training forward, and what the backward passes revealed of it."""

from __future__ import annotations

from torch import Tensor

from fimprobe.training.capture.backward_reach import Reach


class CapturedOutput:
    """An output of a forward pass, with the loss gradient that arrived at it.

    A step may make several backward passes through one forward (pieces of a sequence, several
    losses): gradients add up, positions are united. A pass with a larger ``Reach`` replaces what a
    pass with a smaller one left. All tensors are the training's own, not copies.

    Args:
        outputs: The output [B, ...], detached, if its values are needed.
        has_positions: Whether it is [B, T, ...], whose positions may lack a label.
        feeds: Other outputs that are computed from it.
        is_default: Whether it is the one that is measured by default.

    Attributes:
        name: The name of a single measured output among several; "" where it has none.
        label_positions: Bool, of the labels' shape, True where the loss gradient is not zero; set if
            only the label mask is needed.
        is_read: A bool tensor, whether a gradient that is not zero arrived; set if only that is
            needed.
        gradient_arrived: Whether a gradient arrived.
    """

    def __init__(
        self,
        outputs: Tensor | None = None,
        *,
        has_positions: bool = False,
        feeds: frozenset[str] = frozenset(),
        is_default: bool = False,
    ) -> None:
        self.has_positions, self.feeds, self.is_default = has_positions, feeds, is_default
        self.name = ""
        self.label_positions: Tensor | None = None
        self.is_read: Tensor | None = None
        self.gradient_arrived = False
        self._outputs = None if outputs is None else (outputs, outputs._version)
        self._changed_before_loss = False
        self._gradient: tuple[Tensor, int] | None = None
        self._gradient_overwritten = False
        self._gradient_reach = Reach.UNFINISHED

    @property
    def outputs(self) -> Tensor | None:
        """The output [B, ...]; None if not needed, or if written to after the forward."""
        if self._outputs is None or self.changed:
            return None
        return self._outputs[0]

    @property
    def changed(self) -> bool:
        """Whether the output was changed in place after the forward."""
        if self._outputs is None:
            return False
        return self._changed_before_loss or self._outputs[0]._version != self._outputs[1]

    @property
    def changed_before_loss(self) -> bool:
        """Whether it was changed before the loss, whose gradient then belongs to other values."""
        # an in-place operation on a view replaces the node of the hook: no gradient arrives
        without_gradient = self.changed and not self.gradient_arrived
        return self._changed_before_loss or without_gradient

    @property
    def gradient(self) -> Tensor | None:
        """The loss gradient at the output [B, ...], summed over the backward passes.

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
            self.label_positions = self._gradient = self.is_read = None
            self._gradient_overwritten = self.gradient_arrived = False
            self._gradient_reach = reach
        return reach == self._gradient_reach

    def store_gradient(self, gradient: Tensor) -> None:
        """Add the gradient [B, ...] of one backward pass at the output.

        The first is kept without a copy: the reference keeps autograd from reusing its memory.
        """
        self.gradient_arrived = True
        self._changed_before_loss = self.changed
        gradient = gradient.detach() if gradient.requires_grad else gradient
        if self._gradient is not None:
            previous = self.gradient
            self._gradient_overwritten = previous is None
            if previous is None:
                return
            gradient = previous + gradient
        self._gradient = (gradient, gradient._version)

    def store_presence(self, gradient: Tensor) -> None:
        """Store whether the gradient [B, ...] of one backward pass is not zero anywhere."""
        self.gradient_arrived = True
        present = gradient.detach().any()  # stays on the device
        self.is_read = present if self.is_read is None else self.is_read | present

    def release(self) -> None:
        """Drop all references to tensors."""
        self.label_positions = self.is_read = self._outputs = self._gradient = None
