"""Elementwise functions that BackPACK lacks or computes wrongly, as its ``Derivatives``.

As in BackPACK, the V axis comes first: ``jac_t_mat_prod`` maps M [V, N, *output] to Jᵀ M, and
``param_mjp(..., sum_batch=False)`` maps it to per-sample gradients [V, N, *parameter].

GELU and SiLU are written a second time on purpose: this engine is the oracle of the autograd engine,
so that it shares no formula with :mod:`fimprobe.engines.layers.activations`.
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
    """The identity f(x) = x, for Identity and every kind of Dropout in eval mode."""

    def hessian_is_zero(self, module: Any) -> bool:
        """True: f is linear."""
        return True

    def _jac_t_mat_prod(self, module, g_inp, g_out, mat, subsampling=None):
        return mat


class ClosedFormDerivatives(ElementwiseDerivatives):
    """An activation given by a function that maps (module, x) to its first two derivatives."""

    def __init__(self, derivatives: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.derivatives = derivatives

    def hessian_is_zero(self, module: Any) -> bool:
        """False: f'' is not zero."""
        return False

    def df(self, module, g_inp, g_out, subsampling=None):
        """The derivative f'(x), of the shape of the input."""
        x = subsample(module.input0, subsampling=subsampling).detach()
        return self.derivatives(module, x)[0]

    def d2f(self, module, g_inp, g_out):
        """The second derivative f''(x), of the shape of the input."""
        return self.derivatives(module, module.input0.detach())[1]


def gelu_derivatives(module: nn.GELU, x: Tensor) -> tuple[Tensor, Tensor]:
    """First two derivatives of GELU, exact or with tanh.

    Exact: f = xΦ, f' = Φ + xφ and f'' = (2 − x²)φ. With tanh: f = x(1 + tanh u)/2 with
    u = √(2/π)(x + 0.044715x³).

    Args:
        module: The layer, whose option ``approximate`` selects the formula.
        x: Its inputs, of any shape.

    Returns:
        f' and f'', of the shape of ``x``.
    """
    if module.approximate == "none":
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density, (2 - x.square()) * density
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x.pow(3)))
    u1, u2 = c * (1 + 3 * a * x.square()), 6 * a * c * x
    sech2 = 1 - t.square()
    first = (1 + t) / 2 + x * sech2 * u1 / 2
    return first, sech2 * u1 + x / 2 * (sech2 * u2 - 2 * t * sech2 * u1.square())


def silu_derivatives(module: nn.SiLU, x: Tensor) -> tuple[Tensor, Tensor]:
    """First two derivatives of SiLU: f' = s + xs(1−s) and f'' = s(1−s)(2 + x(1−2s)).

    Here f = xs, and s is the sigmoid.

    Args:
        module: The layer, which is not read.
        x: Its inputs, of any shape.

    Returns:
        f' and f'', of the shape of ``x``.
    """
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return s + x * s * rest, s * rest * (2 + x * (rest - s))


def softplus_derivatives(module: nn.Softplus, x: Tensor) -> tuple[Tensor, Tensor]:
    """First two derivatives of Softplus: f' = s(βx) and f'' = βs(1−s), s being the sigmoid.

    Where βx exceeds the threshold, f is linear.

    Args:
        module: The layer, with β and the threshold.
        x: Its inputs, of any shape.

    Returns:
        f' and f'', of the shape of ``x``.
    """
    z = module.beta * x
    linear = z > module.threshold
    first = torch.sigmoid(z).masked_fill(linear, 1)
    return first, (module.beta * torch.sigmoid(z) * torch.sigmoid(-z)).masked_fill(linear, 0)


def mish_derivatives(module: nn.Mish, x: Tensor) -> tuple[Tensor, Tensor]:
    """First two derivatives of Mish: f = xt with t = tanh(softplus x).

    With the sigmoid s and t' = (1 − t²)s: f' = t + xt' and f'' = t'(2 + x(1 − s − 2ts)).

    Args:
        module: The layer, which is not read.
        x: Its inputs, of any shape.

    Returns:
        f' and f'', of the shape of ``x``.
    """
    t, s = torch.tanh(nn.functional.softplus(x)), torch.sigmoid(x)
    t_first = (1 - t.square()) * s
    return t + x * t_first, t_first * (2 + x * (torch.sigmoid(-x) - 2 * t * s))


def log_sigmoid_derivatives(module: nn.LogSigmoid, x: Tensor) -> tuple[Tensor, Tensor]:
    """First two derivatives of LogSigmoid: f' = s(−x) and f'' = −s(x)s(−x), s being the sigmoid.

    The e^x in BackPACK's formula overflows.

    Args:
        module: The layer, which is not read.
        x: Its inputs, of any shape.

    Returns:
        f' and f'', of the shape of ``x``.
    """
    rest = torch.sigmoid(-x)
    return rest, -torch.sigmoid(x) * rest


class PReLUDerivatives(ElementwiseDerivatives, BaseParameterDerivatives):
    """PReLU, f(x) = max(x, 0) + w min(x, 0), with one w for each channel or for all."""

    def hessian_is_zero(self, module: Any) -> bool:
        """True: f is piecewise linear in x."""
        return True

    def df(self, module, g_inp, g_out, subsampling=None):
        """The derivative in x, of the shape of the input: 1 where x > 0, else w."""
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
