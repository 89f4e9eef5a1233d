"""The family of labels that a model implies without a loss, for ``likelihood="auto"``."""

from __future__ import annotations

from typing import Any

from torch import nn

from fimprobe.errors import FimprobeError, logger
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.twin import unwrap
from fimprobe.training.likelihood_inference.transformers_heads import infer_from_model


def infer_family(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Likelihood, str]:
    """Return the likelihood that the class of a transformers model implies, and why.

    Args:
        model: The model.
        args: Positional inputs of its forward.
        kwargs: Keyword inputs; their labels decide where the class does not.

    Raises:
        FimprobeError: If the model does not imply one.
    """
    decision = infer_from_model(model, args, kwargs)
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
