"""The data's labels of a captured training batch, for the empirical Fisher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods.bernoulli import Bernoulli
from fimprobe.likelihoods.categorical import IGNORED, Categorical

REMEDY = "pass labels= a function from the forward's (args, kwargs) to the labels"


def labels_from_gradient(outputs: Tensor, gradient: Tensor, likelihood: Any) -> Tensor:
    """Labels read off the gradient of the user's own loss: it is c·(η − t(y)) at the outputs.

    The class whose entry is negative, the sign of a sigmoid's; −100 where the loss read nothing.
    Weights on the loss do not change the labels, but are refused where they differ much.

    Raises:
        BatchError: where the gradient is not that of this likelihood with hard labels.
    """
    dim = None
    if isinstance(likelihood, Categorical):
        dim = likelihood.class_dim
        # where the model is sure, p_y rounds to 1: no entry is below zero, and y is its choice
        sure = gradient.amin(dim) >= 0
        labels = torch.where(sure, outputs.argmax(dim), gradient.argmin(dim))
        labels = torch.where((gradient != 0).any(dim), labels, IGNORED)
    elif isinstance(likelihood, Bernoulli):
        labels = ((gradient < 0) | ((gradient == 0) & (outputs > 0))).to(outputs.dtype)
    else:
        raise FimprobeError(
            f"estimators holds 'empirical', but labels of likelihood={likelihood.name!r} cannot be "
            f"read off the loss; {REMEDY}"
        )
    score = likelihood.data_score(outputs, labels).double()
    if not _matches(score, -gradient.double(), dim, torch.finfo(outputs.dtype).eps):
        raise BatchError(
            "the loss's gradient is not that of hard labels under this likelihood (smoothed, mixed "
            f"or weighted labels?), so the empirical Fisher is not known here; {REMEDY}"
        )
    return labels


def _matches(score: Tensor, seen: Tensor, dim: int | None, rounding: float) -> bool:
    """Whether ``seen`` is c times ``score``: overall, and at every label by itself.

    One misread label among thousands hardly turns the whole vector, hence the second. There c may
    differ by a factor of two, as it does where a loss averages over each sequence.
    """
    scale = float((score * seen).sum() / score.square().sum().clamp(min=1e-300))
    if not scale * float(score.norm()) > 0.999 * float(seen.norm()):  # the cosine
        return False
    if dim is None:
        dim, score, seen = -1, score.unsqueeze(-1), seen.unsqueeze(-1)
    own = (score * seen).sum(dim, keepdim=True) / score.square().sum(dim, keepdim=True).clamp(
        min=1e-300
    )
    off = (seen - own.clamp(scale / 2, 2 * scale) * score).norm(dim=dim)
    return bool((off <= 0.05 * seen.norm(dim=dim) + 8 * rounding * scale).all())
