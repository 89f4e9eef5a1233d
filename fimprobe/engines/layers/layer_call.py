"""One recorded call of a layer, from which the rules compute per-sample gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCall:
    """One call of a module.

    Attributes:
        module: The module that was called.
        inputs: Its inputs, detached, with the batch first.
        folded: Whether the module saw [B·k, ...]. Inputs and cotangents are then unfolded to
            [B, k, ...].
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    folded: bool = False

    def rows(self, samples: slice) -> LayerCall:
        """The call on some samples only."""
        if all(samples == slice(0, len(x)) for x in self.inputs):
            return self
        return LayerCall(self.module, tuple(x[samples] for x in self.inputs), self.folded)
