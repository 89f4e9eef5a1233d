"""Which positions of a batch carry a label."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fimprobe.model.twin import unwrap
from fimprobe.training.likelihood_inference.transformers_heads import find_head, label_mask


def positions_of_labels(
    model: nn.Module, named: dict[str, Any]
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the inputs of a transformers model without labels, and which positions have a label.

    Args:
        model: The model; others than those of transformers keep their inputs.
        named: Keyword inputs of its forward.
    """
    if find_head(model) is None:
        return named, None
    mask = label_mask(model, (), named)
    if getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False):
        return named, mask  # the inputs of the decoder are made of the labels
    # without labels the forward computes no loss
    return {k: v for k, v in named.items() if k != "labels"}, mask
