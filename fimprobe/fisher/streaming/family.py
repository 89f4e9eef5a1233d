"""The family of labels of a model, and which positions carry a label, for ``likelihood="auto"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fimprobe.errors import FimprobeError, logger
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.twin import unwrap
from fimprobe.training.transformers_heads import find_head, infer_from_model, label_mask


def infer_family(model: nn.Module, first: Any) -> tuple[Likelihood, str]:
    """Return the likelihood that the class of a transformers model implies, and why.

    Args:
        model: The model.
        first: The first batch of the data, or None; its labels decide where the class does not.

    Raises:
        FimprobeError: If the model does not imply one.
    """
    decision = infer_from_model(model)
    if decision is None and isinstance(first, Mapping):
        decision = infer_from_model(model, (), dict(first))
    if decision is None:
        raise FimprobeError(
            f"`likelihood` must be named for a {type(unwrap(model)).__name__}, got 'auto': only "
            "heads of transformers imply it. Pass 'categorical' for logits of classes, "
            "'bernoulli', 'gaussian', 'poisson' or an object of fimprobe.likelihoods."
        )
    if decision.likelihood is None:
        raise FimprobeError(
            f"`likelihood` must be named, got 'auto': {decision.reason}. {decision.remedy}."
        )
    if decision.warn:
        logger.warning("fimprobe: %s", decision.reason)
    return decision.likelihood, decision.reason


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
