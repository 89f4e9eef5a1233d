"""Vectors pulled back through a graph, and derivatives along a direction, by backward passes alone.

``torch.autograd.grad`` given ``grad_outputs`` imports sympy, and forward mode imports TorchDynamo:
half a second and more of a training that uses neither. A scalar whose gradient is the vector needs
no import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _ConstantCotangent(torch.autograd.Function):
    """Zero, with the gradients v_i in the outputs h_i: Σ_i ⟨v_i, h_i⟩ without taking the products."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        half = len(tensors) // 2
        ctx.vectors = tensors[half:]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.vectors, *[None] * len(ctx.vectors))


def vjp(
    outputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    places: Sequence[Any],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Σ_i v_iᵀ ∂h_i/∂place for constant vectors v_i, of each place (None where nothing arrives).

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pull_back([x.square()], [torch.tensor([1.0, 10.0])], [x])[0].tolist()
    [2.0, 40.0]
    """
    with torch.enable_grad():
        scalar = _ConstantCotangent.apply(*outputs, *(v.detach() for v in vectors))
    return torch.autograd.grad(
        scalar, places, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )


def jvp(function: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """The derivative of a function of tensors along a direction, by two backward passes.

    uᵀJ is linear in u, and its derivative in u along v is Jv.

    >>> push_forward(lambda x: x.square(), [torch.tensor([3.0])], [torch.tensor([2.0])]).tolist()
    [12.0]
    """
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in at]
        out = function(*inputs)
        if not out.requires_grad:
            return torch.zeros_like(out)
        u = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad((out * u).sum(), inputs, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(pulled, along, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return torch.zeros_like(out)
    (found,) = vjp([g for g, _ in pairs], [v for _, v in pairs], [u], retain_graph=False)
    return torch.zeros_like(out) if found is None else found
