"""What is checked in every measurement: copies of a sample agree, and gradients add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fimprobe.engines.backpack.first_order_rules import ParameterSums
from fimprobe.errors import FimprobeError


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding explains."""
    if dtype in (torch.bfloat16, torch.float16):
        return 0.1
    return 1e-3 if dtype == torch.float32 else 1e-8


def check_copies(h: Tensor, samples: int) -> None:
    """Raise where the outputs [S·n, ...] of S copies of n samples differ."""
    first, allowed = h[:samples], tolerance(h.dtype)
    copies = h.reshape(-1, *first.shape)
    slack = allowed * float(first.abs().max())
    if not bool(((copies - first).abs() <= allowed * first.abs() + slack).all()):
        raise FimprobeError(
            "copies of a sample have different outputs: the model draws random numbers in eval mode "
            "or couples its samples; pass engine='autograd', which names the cause"
        )


def check_total(name: str, sums: ParameterSums | None, gradient: Tensor, count: int) -> None:
    """Raise unless Σ_b Σ_s g_bs by the layer's rule is the gradient by plain autograd.

    ``count``: how many g_bs there are.
    """
    if sums is None:
        raise FimprobeError(
            f"guard: BackPACK did not see {name!r}, although the outputs depend on it; pass "
            "engine='autograd'"
        )
    scale = math.sqrt(count * float(sums.squared_norms.sum()))  # ≥ Σ‖g‖
    difference = float((sums.total - gradient.double()).norm())
    if not difference <= tolerance(gradient.dtype) * max(scale, float(gradient.double().norm())):
        raise FimprobeError(
            f"guard: the per-sample gradients of {name!r} do not add up to its gradient (off by "
            f"{difference:.2g} of {scale:.2g}); pass engine='autograd'"
        )
