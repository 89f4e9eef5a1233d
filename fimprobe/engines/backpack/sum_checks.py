"""Checks of every measurement: copies of a sample agree, and per-sample gradients add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fimprobe.engines.backpack.first_order_rules import ParameterSums
from fimprobe.errors import FimprobeError


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding explains."""
    if dtype in (torch.bfloat16, torch.float16):
        return 0.1
    return 1e-3 if dtype == torch.float32 else 1e-8


def check_copies(h: Tensor, samples: int) -> None:
    """Raise FimprobeError if copies of a sample have different outputs.

    Args:
        h: Outputs [S·n, ...] of S copies of n samples, the copies outermost.
        samples: n.

    Raises:
        FimprobeError: If a copy differs from the first one by more than rounding explains.
    """
    first, allowed = h[:samples], tolerance(h.dtype)
    copies = h.reshape(-1, *first.shape)
    slack = allowed * float(first.abs().max())
    if not bool(((copies - first).abs() <= allowed * first.abs() + slack).all()):
        raise FimprobeError(
            "copies of a sample have different outputs: the model draws random numbers in eval mode "
            "or couples its samples. Pass engine='autograd', which names the cause."
        )


def check_total(name: str, sums: ParameterSums | None, gradient: Tensor, count: int) -> None:
    """Raise FimprobeError unless the per-sample gradients add up to the gradient.

    Args:
        name: The parameter.
        sums: Its sums by the layer's rule; None if BackPACK did not visit the layer.
        gradient: Its gradient by plain autograd, Σ_b Σ_s g_bs.
        count: Number of per-sample gradients.
    """
    if sums is None:
        raise FimprobeError(
            f"guard: BackPACK did not see {name!r}, although the outputs depend on it. Pass "
            "engine='autograd'."
        )
    scale = math.sqrt(count * float(sums.squared_norms.sum()))  # ≥ Σ‖g‖
    difference = float((sums.total - gradient.double()).norm())
    if not difference <= tolerance(gradient.dtype) * max(scale, float(gradient.double().norm())):
        raise FimprobeError(
            f"guard: the per-sample gradients of {name!r} do not add up to its gradient (off by "
            f"{difference:.2g} of {scale:.2g}). Pass engine='autograd'."
        )
