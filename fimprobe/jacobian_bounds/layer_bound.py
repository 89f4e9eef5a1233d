"""The record of a layer's bounds, and its concatenation over parts of a batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


def concatenate_bounds(parts: list[LayerBound]) -> LayerBound:
    """The bounds of a batch from those of its parts; without bounds if one part has none."""
    reason = next((p.reason for p in parts if p.reason is not None), None)
    if len(parts) == 1 or reason is not None:
        return next(p for p in parts if p.reason == reason)
    names = [f.name for f in fields(LayerBound) if isinstance(getattr(parts[0], f.name), Tensor)]
    tensors: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
    return replace(parts[0], **tensors)


@dataclass(frozen=True, kw_only=True)
class LayerBound:
    """Weight-norm bounds on J_l = ∂h_L/∂W_l of each input, for a layer's trained weight and bias W_l.

    Tensors are float64 [B] on the CPU. They are None where ``reason`` is given.
    """

    frobenius: Tensor | None = None
    """A bound of ‖J_l‖_F: Soen & Sun (2021), eq. 20, in the form that holds for every layer."""
    spectral: Tensor | None = None
    """A bound of s_max(J_l): Soen & Sun (2021), eq. 21."""
    weight_spectral_norm: float | None = None
    """s_max of the layer's own linear operator, without bias.

    Exact if the operator is small. Else a bound, at most 10 % above it; for convolutions on large
    images 22 %, and the effect of their border. None where no bound needs it and it is expensive.
    """
    weight_frobenius_norm: float | None = None
    """‖·‖_F of that operator on one input: √T ‖W‖_F for a Linear layer used at T positions."""
    reason: str | None = None
    """Why there are no bounds."""
