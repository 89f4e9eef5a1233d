"""Elementwise functions that BackPACK lacks or has wrong, as its ``Derivatives``.

With the V axis first, as BackPACK has it: ``jac_t_mat_prod`` takes M [V, N, *output] to Jᵀ M, and
``param_mjp(..., sum_batch=False)`` to per-sample gradients [V, N, *parameter].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from backpack.core.derivatives.basederivatives import BaseDerivatives, BaseParameterDerivatives
from backpack.core.derivatives.elementwise import ElementwiseDerivatives
from backpack.utils.subsampling import subsample
from torch import Tensor, nn


class IdentityDerivatives(BaseDerivatives):
    """f(x) = x: Identity, and every kind of Dropout in eval mode."""

    def hessian_is_zero(self, module: Any) -> bool:
        """f is linear."""
        return True

    def _jac_t_mat_prod(self, module, g_inp, g_out, mat, subsampling=None):
        return mat


class CurveDerivatives(ElementwiseDerivatives):
    """An activation given by its first and second derivative, functions of (module, x)."""

    def __init__(self, curve: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.curve = curve

    def hessian_is_zero(self, module: Any) -> bool:
        """f'' ≠ 0."""
        return False

    def df(self, module, g_inp, g_out, subsampling=None):
        """f'(x)."""
        return self.curve(module, subsample(module.input0, subsampling=subsampling).detach())[0]

    def d2f(self, module, g_inp, g_out):
        """f''(x)."""
        return self.curve(module, module.input0.detach())[1]


def gelu_curve(module: nn.GELU, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = xΦ: f' = Φ + xφ, f'' = (2 − x²)φ; or f = x(1 + tanh u)/2, u = √(2/π)(x + 0.044715x³)."""
    if module.approximate == "none":
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density, (2 - x.square()) * density
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x.pow(3)))
    u1, u2 = c * (1 + 3 * a * x.square()), 6 * a * c * x
    slope = 1 - t.square()
    first = (1 + t) / 2 + x * slope * u1 / 2
    return first, slope * u1 + x / 2 * (slope * u2 - 2 * t * slope * u1.square())


def silu_curve(module: nn.SiLU, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = xs, s the sigmoid: f' = s + xs(1−s), f'' = s(1−s)(2 + x(1−2s))."""
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return s + x * s * rest, s * rest * (2 + x * (rest - s))


def softplus_curve(module: nn.Softplus, x: Tensor) -> tuple[Tensor, Tensor]:
    """f' = s(βx), f'' = βs(1−s); linear where βx exceeds the threshold."""
    z = module.beta * x
    linear = z > module.threshold
    first = torch.sigmoid(z).masked_fill(linear, 1)
    return first, (module.beta * torch.sigmoid(z) * torch.sigmoid(-z)).masked_fill(linear, 0)


def mish_curve(module: nn.Mish, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x tanh(softplus x), with t the tanh and s the sigmoid."""
    t, s = torch.tanh(nn.functional.softplus(x)), torch.sigmoid(x)
    slope = (1 - t.square()) * s
    return t + x * slope, slope * (2 + x * (torch.sigmoid(-x) - 2 * t * s))


def log_sigmoid_curve(module: nn.LogSigmoid, x: Tensor) -> tuple[Tensor, Tensor]:
    """f' = s(−x), f'' = −s(x)s(−x); BackPACK's own e^x overflows."""
    rest = torch.sigmoid(-x)
    return rest, -torch.sigmoid(x) * rest


class PReLUDerivatives(ElementwiseDerivatives, BaseParameterDerivatives):
    """f(x) = max(x, 0) + w min(x, 0), w per channel or one for all."""

    def hessian_is_zero(self, module: Any) -> bool:
        """f is piecewise linear in x."""
        return True

    def df(self, module, g_inp, g_out, subsampling=None):
        """1 or w."""
        x = subsample(module.input0, subsampling=subsampling).detach()
        w = module.weight.detach()
        w = w.view(-1, *[1] * (x.dim() - 2)) if w.numel() > 1 else w
        return torch.where(x > 0, torch.ones_like(x), w)

    def _weight_jac_t_mat_prod(self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None):
        x = subsample(module.input0, subsampling=subsampling).detach()
        product = (mat * x.clamp(max=0)).unsqueeze(-1)
        if module.weight.numel() > 1:
            gradient = product.flatten(3).sum(3)
        else:
            gradient = product.flatten(2).sum(2, keepdim=True)
        return gradient.sum(1) if sum_batch else gradient
