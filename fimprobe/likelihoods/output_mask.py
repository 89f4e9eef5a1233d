"""The mask of labels, spread over the outputs that each label belongs to."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def spread_mask(likelihood: Any, mask: Tensor, outputs: Tensor) -> Tensor:
    """Return a mask of labels in a shape that broadcasts to the outputs.

    Args:
        likelihood: The family; one with several kinds of labels has a method ``spread_mask``.
        mask: Bool, of the labels' shape.
        outputs: A tensor of the outputs' shape [B, ...].

    >>> import torch
    >>> from fimprobe.likelihoods import Categorical
    >>> spread_mask(Categorical(), torch.ones(2, 3), torch.zeros(2, 3, 5)).shape
    torch.Size([2, 3, 1])
    """
    spread = getattr(likelihood, "spread_mask", None)
    if spread is not None:
        spread_out: Tensor = spread(mask, outputs)
        return spread_out
    if mask.dim() < outputs.dim():  # labels have no class dimension
        return mask.unsqueeze(getattr(likelihood, "class_dim", -1))
    return mask
