"""The record of a layer's bound, and its concatenation over processes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


def concatenate_bounds(parts: list[LayerBound]) -> LayerBound:
    """The bounds of a batch from those of its parts."""
    reason = next((p.reason for p in parts if p.reason is not None), None)
    if len(parts) == 1 or reason is not None:
        return next(p for p in parts if p.reason == reason)
    names = [f.name for f in fields(LayerBound) if isinstance(getattr(parts[0], f.name), Tensor)]
    whole: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
    return replace(parts[0], **whole)


@dataclass(frozen=True)
class LayerBound:
    """Weight-norm bounds on J_l = ∂h_L/∂W_l, W_l the layer's trained weight and bias, per input.

    Tensors are float64 [B] on the CPU. Where ``reason`` is given the bounds are None.
    """

    frobenius: Tensor | None = None
    """At least ‖J_l‖_F: (20) in the form that holds for every layer."""
    spectral: Tensor | None = None
    """At least s_max(J_l): (21)."""
    unsafe_frobenius: Tensor | None = None
    """(20) as printed, ‖X̃_l‖_F Π_{i>l} ‖W_i⁻‖_F: below ‖J_l‖_F at the last layer, and with GELU."""
    input_norm: Tensor | None = None
    """At least s_max(X̃_l): ‖h̄_l‖ for a layer used at one position."""
    activation_constant: Tensor | None = None
    """Product of the constants of activations, norms of poolings, ... between layer and outputs."""
    weight_spectral_norm: float | None = None
    """s_max of the layer's own linear operator without bias: exact if it is small, else a bound, at
    most 10 % above it, for convolutions on large images 22 % and what their border takes.
    None where it enters no bound and is dear."""
    weight_frobenius_norm: float | None = None
    """‖·‖_F of that operator on one input: √T ‖W⁻‖_F for a Linear used at T positions."""
    reason: str | None = None
    """Why there are no bounds."""
