"""The data labels of a captured training batch, for the empirical Fisher information."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods.bernoulli import Bernoulli
from fimprobe.likelihoods.categorical import IGNORED, Categorical

LABELS_REMEDY = "Pass labels= a function from the forward's (args, kwargs) to the labels"


def labels_from_gradient(outputs: Tensor, gradient: Tensor, likelihood: Any) -> Tensor:
    """Return the labels that the loss gradient c·(η − t(y)) at the outputs implies.

    For softmax outputs: the class whose entry is negative, −100 where the gradient is zero. For
    sigmoid outputs: 1 where the gradient is negative. Weights of the loss do not change the labels;
    weights that differ by more than a factor of two are refused.

    Args:
        outputs: h [B, ...].
        gradient: Of the loss at the outputs, of the same shape.
        likelihood: The family of the labels.

    Returns:
        Labels as the likelihood expects them.

    Raises:
        BatchError: If the gradient is not that of this likelihood with hard labels.
        FimprobeError: If the family is neither categorical nor Bernoulli.
    """
    dim = None
    if isinstance(likelihood, Categorical):
        dim = likelihood.class_dim
        # where p_y rounds to 1, no entry is below zero, and y is the predicted class
        confident = gradient.amin(dim) >= 0
        labels = torch.where(confident, outputs.argmax(dim), gradient.argmin(dim))
        labels = torch.where((gradient != 0).any(dim), labels, IGNORED)
    elif isinstance(likelihood, Bernoulli):
        labels = ((gradient < 0) | ((gradient == 0) & (outputs > 0))).to(outputs.dtype)
    else:
        raise FimprobeError(
            f"labels must be given for the estimator 'empirical': those of likelihood="
            f"{likelihood.name!r} cannot be read off the loss. {LABELS_REMEDY}."
        )
    score = likelihood.data_score(outputs, labels).double()
    if not _matches(score, -gradient.double(), dim, torch.finfo(outputs.dtype).eps):
        raise BatchError(
            "the loss gradient is not that of hard labels under this likelihood (smoothed, mixed or "
            f"weighted labels?), so the empirical Fisher is not known. {LABELS_REMEDY}."
        )
    return labels


def _matches(score: Tensor, gradient: Tensor, dim: int | None, rounding: float) -> bool:
    """Decide whether ``gradient`` is c times ``score``, as a whole and at every label.

    One misread label among thousands hardly turns the whole vector, hence the second comparison.
    There c may differ by a factor of two, as it does if a loss averages over each sequence.

    Args:
        score: Of the labels at the outputs [B, ...], float64.
        gradient: The negative loss gradient, of the same shape.
        dim: The class dimension; None if every entry has its own label.
        rounding: Unit roundoff of the outputs.
    """
    scale = float((score * gradient).sum() / score.square().sum().clamp(min=1e-300))
    if not scale * float(score.norm()) > 0.999 * float(gradient.norm()):  # the cosine
        return False
    if dim is None:
        dim, score, gradient = -1, score.unsqueeze(-1), gradient.unsqueeze(-1)
    factor = (score * gradient).sum(dim, keepdim=True) / score.square().sum(dim, keepdim=True).clamp(
        min=1e-300
    )
    residual = (gradient - factor.clamp(scale / 2, 2 * scale) * score).norm(dim=dim)
    return bool((residual <= 0.05 * gradient.norm(dim=dim) + 8 * rounding * scale).all())
