"""Vector-Jacobian and Jacobian-vector products, both by backward passes.

``torch.autograd.grad`` with ``grad_outputs`` imports sympy, and forward mode imports TorchDynamo:
half a second or more in a training run that uses neither. A scalar whose gradient is the cotangent
needs no import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _ConstantCotangent(torch.autograd.Function):
    """Zero, with gradient v_i at the output h_i: Σ_i ⟨v_i, h_i⟩ without forming the products."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        half = len(tensors) // 2
        ctx.cotangents = tensors[half:]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.cotangents, *[None] * len(ctx.cotangents))


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Any],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Pull constant cotangents back through the autograd graph.

    Args:
        outputs: Tensors h_i with a graph.
        cotangents: v_i of the shape of h_i.
        inputs: Tensors or gradient edges x_j.
        retain_graph: Whether the graph can be used again.
        create_graph: Whether the result can be differentiated.

    Returns:
        Σ_i v_iᵀ ∂h_i/∂x_j for each input; None where no output depends on it.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> vjp([x.square()], [torch.tensor([1.0, 10.0])], [x])[0].tolist()
    [2.0, 40.0]
    """
    with torch.enable_grad():
        scalar = _ConstantCotangent.apply(*outputs, *(v.detach() for v in cotangents))
    return torch.autograd.grad(
        scalar, inputs, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """Differentiate a function along a direction, by two backward passes.

    uᵀJ is linear in u, so that its derivative in u along v is Jv.

    Args:
        function: A function of tensors that returns one tensor.
        primals: Where it is differentiated.
        tangents: The direction v, one tensor for each argument.

    Returns:
        Jv, in the shape of the function's value.

    >>> jvp(lambda x: x.square(), [torch.tensor([3.0])], [torch.tensor([2.0])]).tolist()
    [12.0]
    """
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in primals]
        out = function(*inputs)
        if not out.requires_grad:
            return torch.zeros_like(out)
        u = torch.zeros_like(out, requires_grad=True)
        gradients = torch.autograd.grad((out * u).sum(), inputs, create_graph=True, allow_unused=True)
    pairs = [
        (g, v) for g, v in zip(gradients, tangents, strict=True) if g is not None and g.requires_grad
    ]
    if not pairs:
        return torch.zeros_like(out)
    (product,) = vjp([g for g, _ in pairs], [v for _, v in pairs], [u], retain_graph=False)
    return torch.zeros_like(out) if product is None else product
