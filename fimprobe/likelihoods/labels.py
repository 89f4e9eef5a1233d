"""The data's labels of a captured training batch, for the empirical Fisher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.likelihoods.bernoulli import Bernoulli
from fimprobe.likelihoods.categorical import Categorical
from fimprobe.types import BatchError, FimprobeError

REMEDY = "pass labels= a function from the forward's (args, kwargs) to the labels"


def labels_from_gradient(outputs: Tensor, gradient: Tensor, likelihood: Any) -> Tensor:
    """Labels read off the gradient of the user's own loss: it is c·(η − t(y)) at the outputs.

    The class whose entry is negative, the sign of a sigmoid's; −100 where the loss read nothing.

    Raises:
        BatchError: where the gradient is not that of this likelihood with hard labels.
    """
    if isinstance(likelihood, Categorical):
        read = (gradient != 0).any(likelihood.class_dim)
        labels = torch.where(read, gradient.argmin(likelihood.class_dim), -100)
    elif isinstance(likelihood, Bernoulli):
        labels = (gradient < 0).to(outputs.dtype)
    else:
        raise FimprobeError(
            f"estimators holds 'empirical', but labels of likelihood={likelihood.name!r} cannot be "
            f"read off the loss; {REMEDY}"
        )
    score = likelihood.data_score(outputs, labels).flatten().double()
    seen = -gradient.flatten().double()
    cosine = torch.dot(score, seen) / (score.norm() * seen.norm()).clamp(min=1e-300)
    if not float(cosine) > 0.999:
        raise BatchError(
            "the loss's gradient is not that of hard labels under this likelihood (smoothed, mixed "
            f"or weighted labels?), so the empirical Fisher is not known here; {REMEDY}"
        )
    return labels
