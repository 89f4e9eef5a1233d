"""vᵀ I(h) v: the variance of δᵀv over labels drawn from the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.likelihoods.base import Likelihood


def fisher_quadratic(likelihood: Likelihood, h: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return vᵀ I(h) v of every input, without labels.

    Args:
        likelihood: The family. Without ``fisher_quadratic`` it needs the columns of a factor L with
            L Lᵀ = I(h).
        h: Outputs [n, ...].
        v: Vectors, of the same shape.
        mask: Bool, of the labels' shape; False leaves a label out.

    Returns:
        [n], float64.
    """
    family: Any = likelihood
    if hasattr(family, "fisher_quadratic"):
        result: Tensor = family.fisher_quadratic(h, v, mask)
        return result
    total = torch.zeros(len(h), dtype=torch.float64, device=h.device)
    for column in family.hutchinson_passes(h, mask):
        products = (column.cotangent * v).flatten(1).sum(1).double()
        total += column.square.double() * products.square()
    return total
