"""Smooth activations in closed form: one product for δ, three for its derivative.

torch differentiates the gradient of a GELU or SiLU through all operations of its backward, some
thirty passes over the activations for each Hessian-vector product. With σ' and σ'' kept from the
forward pass, δ ↦ σ'δ takes one pass and its derivative (σ'v, σ''δv) three.
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

from fimprobe.model.twin import is_transformed

ActivationDerivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps x to σ(x), σ'(x) and σ''(x), all of the shape of x."""


def gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ = x Φ(x), σ' = Φ + xφ and σ'' = φ (2 − x²)."""
    cdf = (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    square = x.square()
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    # out of place before in place: ``cdf`` and ``square`` are overwritten by the derivatives
    return x * cdf, cdf.addcmul_(x, density), square.sub_(2).mul_(density).neg_()


def gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ = x (1 + tanh u)/2 with u = √(2/π) (x + 0.044715 x³), σ' and σ''."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    t = (square * (k * cubic)).add_(k).mul_(x).tanh_()
    u_first = square.mul_(3 * k * cubic).add_(k)  # u'
    sech2 = (t * t).neg_().add_(1)  # 1 − t²
    half = (x * 0.5).mul_(sech2)
    gate = (t + 1).mul_(0.5)
    # σ'' = sech² u' + x/2 sech² (u'' − 2 t u'²)
    second = (t * u_first).mul_(u_first).mul_(-2).add_(x, alpha=6 * k * cubic).mul_(half)
    return x * gate, gate.addcmul_(half, u_first), second.addcmul_(sech2, u_first)


def silu(x: Tensor, a: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ = x s(a x), σ' and σ'', s being the sigmoid; a = 1.702 approximates a GELU.

    Args:
        x: Inputs of any shape.
        a: The factor inside the sigmoid.

    Returns:
        σ, σ' and σ'', of the shape of ``x``.
    """
    s = torch.sigmoid(x if a == 1.0 else a * x)
    s_first = (s * s).neg_().add_(s).mul_(a)  # a s (1 − s)
    second = (s * -2).add_(1).mul_(x).mul_(a).add_(2).mul_(s_first)
    return x * s, s.addcmul_(x, s_first), second


def derivatives_of(module: nn.Module) -> ActivationDerivatives | None:
    """The closed form of an activation of exactly a known class; None for any other module."""
    kind = type(module)
    if kind is nn.GELU:
        return gelu if module.approximate == "none" else gelu_tanh
    return _BY_CLASS_NAME.get(f"{kind.__module__}.{kind.__qualname__}")


def closed_form_forward(module: nn.Module, twice: bool) -> Callable[[Tensor], Tensor] | None:
    """A faster forward for an activation, with the module's values but for rounding.

    Args:
        module: Any module of the twin.
        twice: Whether its gradient will be differentiated.

    Returns:
        The function to run instead of the module's forward; None to keep that.
    """
    derivatives = derivatives_of(module)
    if derivatives is None or "forward" in module.__dict__:
        return None
    if twice:
        return functools.partial(_apply, module.forward, derivatives)
    if type(module).__name__ == "NewGELUActivation":  # transformers writes it in eight operations
        return functools.partial(F.gelu, approximate="tanh")
    return None


def _apply(
    forward: Callable[[Tensor], Tensor],
    derivatives: ActivationDerivatives,
    input: Tensor,  # noqa: A002 - activations may be called with input=
) -> Tensor:
    """Run the closed form; ``forward`` in half precision, without gradient, under ``torch.func``."""
    known = input.dtype in (torch.float32, torch.float64) and not is_transformed()
    if not known or not input.requires_grad:
        return forward(input)
    output: Tensor = _Activation.apply(input, derivatives)
    return output


def is_derivative(node: Any) -> bool:
    """Return whether a node is a closed form's derivative, which can be differentiated once."""
    return bool(node.name() == "_FirstDerivativeBackward")


class _Activation(torch.autograd.Function):
    """σ(x), with σ' and σ'' kept for the backward passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, derivatives: ActivationDerivatives) -> Tensor:
        """Compute σ(x), and keep x, σ'(x) and σ''(x); all have the shape of x."""
        y, first, second = derivatives(x)
        ctx.save_for_backward(x, first, second)
        return y

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        """Return σ'(x) δ, which can be differentiated once more."""
        return _FirstDerivative.apply(delta, *ctx.saved_tensors), None


class _FirstDerivative(torch.autograd.Function):
    """δ ↦ σ'(x) δ, a function of δ and of x."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Compute σ'(x) δ, of the shape of x."""
        ctx.save_for_backward(delta, first, second)
        return first * delta

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, v: Tensor) -> Any:
        """Return σ'(x) v for δ and σ''(x) δ v for x; None where no gradient is needed."""
        delta, first, second = ctx.saved_tensors
        by_delta = first * v if ctx.needs_input_grad[0] else None
        by_x = (second * delta).mul_(v) if ctx.needs_input_grad[1] else None
        return by_delta, by_x, None, None


_BY_CLASS_NAME: dict[str, ActivationDerivatives] = {
    "torch.nn.modules.activation.SiLU": silu,
    "transformers.activations.GELUActivation": gelu,
    "transformers.activations.GELUTanh": gelu_tanh,
    "transformers.activations.NewGELUActivation": gelu_tanh,
    "transformers.activations.QuickGELUActivation": functools.partial(silu, a=1.702),
    "transformers.activations.SiLUActivation": silu,
}
