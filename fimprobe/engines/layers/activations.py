"""Smooth activations in closed form: one product for δ, three for its derivative.

torch differentiates the gradient of a GELU or SiLU through everything it is made of, some thirty
passes over the activations for each Hessian-vector product. With σ' and σ'' kept from the forward,
δ ↦ σ'δ and its derivative (σ'v, σ''δv) take one and three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Curve = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""x to σ(x), σ'(x), σ''(x)."""


def gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x Φ(x): Φ + xφ and φ (2 − x²)."""
    below = (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    square = x.square()
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return x * below, below.addcmul_(x, density), square.sub_(2).mul_(density).neg_()


def gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (1 + tanh u)/2 with u = √(2/π) (x + 0.044715 x³)."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    t = (square * (k * cubic)).add_(k).mul_(x).tanh_()
    slope = square.mul_(3 * k * cubic).add_(k)  # u'
    bell = (t * t).neg_().add_(1)  # 1 − t²
    half = (x * 0.5).mul_(bell)
    below = (t + 1).mul_(0.5)
    # σ'' = bell u' + x/2 bell (u'' − 2 t u'²)
    bend = (t * slope).mul_(slope).mul_(-2).add_(x, alpha=6 * k * cubic).mul_(half)
    return x * below, below.addcmul_(half, slope), bend.addcmul_(bell, slope)


def silu(x: Tensor, a: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x s(a x), s being the sigmoid; a = 1.702 approximates a GELU."""
    s = torch.sigmoid(x if a == 1.0 else a * x)
    slope = (s * s).neg_().add_(s).mul_(a)  # a s (1 − s)
    bend = (s * -2).add_(1).mul_(x).mul_(a).add_(2).mul_(slope)
    return x * s, s.addcmul_(x, slope), bend


def derivatives_of(module: nn.Module) -> Curve | None:
    """The curve of an activation of exactly a known class."""
    kind = type(module)
    if kind is nn.GELU:
        return gelu if module.approximate == "none" else gelu_tanh
    return _CURVES.get(f"{kind.__module__}.{kind.__qualname__}")


def closed_form_forward(module: nn.Module, twice: bool) -> Callable[[Tensor], Tensor] | None:
    """What to run in place of the module's forward; None where that is best.

    ``twice``: its gradient will be differentiated. Values are those of the module but for rounding.
    """
    curve = derivatives_of(module)
    if curve is None or "forward" in module.__dict__:
        return None
    if twice:
        return functools.partial(_run, module.forward, curve)
    if type(module).__name__ == "NewGELUActivation":  # written out in eight operations
        return functools.partial(F.gelu, approximate="tanh")
    return None


def _run(plain: Callable[[Tensor], Tensor], curve: Curve, input: Tensor) -> Tensor:  # noqa: A002
    if input.dtype not in (torch.float32, torch.float64) or not input.requires_grad:
        return plain(input)
    found: Tensor = _Activation.apply(input, curve)
    return found


class _Activation(torch.autograd.Function):
    """σ(x), with σ' and σ'' kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve) -> Tensor:
        y, slope, bend = curve(x)
        ctx.save_for_backward(x, slope, bend)
        return y

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return _Slope.apply(delta, *ctx.saved_tensors), None


class _Slope(torch.autograd.Function):
    """δ ↦ σ'(x) δ, a function of δ and of x."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, x: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(delta, slope, bend)
        return slope * delta

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, v: Tensor) -> Any:
        delta, slope, bend = ctx.saved_tensors
        along = slope * v if ctx.needs_input_grad[0] else None
        return along, (bend * delta).mul_(v) if ctx.needs_input_grad[1] else None, None, None


_CURVES: dict[str, Curve] = {
    "torch.nn.modules.activation.SiLU": silu,
    "transformers.activations.GELUActivation": gelu,
    "transformers.activations.GELUTanh": gelu_tanh,
    "transformers.activations.NewGELUActivation": gelu_tanh,
    "transformers.activations.QuickGELUActivation": functools.partial(silu, a=1.702),
    "transformers.activations.SiLUActivation": silu,
}
