"""The work of exact second-order diagonals, beside that of a forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fimprobe.engines.backpack.derivatives import LAYERS, PLAIN, derivatives_of
from fimprobe.engines.problem.problem import Problem

ENTRY_OPERATIONS = 3
"""Operations on each entry of a per-sample gradient that is formed for a unit vector."""


class Work(NamedTuple):
    """Multiply-adds for one sample."""

    exact: float
    """Those of exact diagonals, apart from the backward passes."""
    forward: float


class _Call(NamedTuple):
    module: nn.Module
    width: int
    forward: float
    pulled_back: float
    """For each unit vector: its product with the Jacobian, and the module's parameters."""


def estimate_work(problem: Problem) -> Work | None:
    """Return the work for one sample; None if a module has no rule.

    Every module that bends has a unit vector for each of its inputs, which all modules before it pull
    back. Of modules side by side it counts those that run first.

    Args:
        problem: The model, and a batch to try it on.
    """
    modules = [m for m in problem.twin.modules() if not list(m.children())]
    if any(type(m) not in LAYERS and type(m) not in PLAIN for m in modules):
        return None
    calls: list[_Call] = []

    def note_call(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note the work of a call; a forward hook.

        Args:
            module: The module.
            inputs: Its arguments.
            output: What it returned.
        """
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append(_work_of_call(module, inputs[0], output))

    handles = [m.register_forward_hook(note_call) for m in modules]
    try:
        problem.evaluate(problem.batch[:1])
    finally:
        for handle in handles:
            handle.remove()
    exact = before = 0.0
    for call in calls:
        if not derivatives_of(call.module).hessian_is_zero(call.module):
            exact += call.width * before
        before += call.pulled_back
    return Work(exact=exact, forward=sum(call.forward for call in calls))


def _work_of_call(module: nn.Module, x: Tensor, y: Tensor) -> _Call:
    """The work of a call for one sample, from x to y."""
    forward = float(max(x.numel(), y.numel()))
    entries = sum(p.numel() for p in module.parameters() if p.requires_grad)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        forward = x.numel() * module.weight[0].numel()
    elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and weight is not None:
        forward = y.numel() * weight[0].numel()
    pulled_back = forward if x.requires_grad else 0.0
    if isinstance(module, nn.Linear) and x.dim() == 2:
        pulled_back += y.numel()  # its gradients are not formed
    elif entries:
        pulled_back += forward + ENTRY_OPERATIONS * entries
    return _Call(module, x.numel(), forward, pulled_back)
