"""The verified domain: the models for which BackPACK is right, and why others are outside of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fimprobe.engines.backpack.call_checks import check_calls
from fimprobe.engines.backpack.derivatives import trainable_modules
from fimprobe.engines.backpack.module_options import module_reason
from fimprobe.engines.backpack.verification import compare_curvature, compare_gradients
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import FimprobeError


def offending_modules(
    problem: Problem, *, second_order: bool, curvature: bool = True
) -> dict[str, str]:
    """The modules outside of the domain that the tests verify, with reasons.

    First order: each trainable parameter belongs to one module of exactly a class in ``LAYERS``, with
    options that BackPACK supports. The module is called once, on one tensor with the samples first,
    and uses the parameter once. Operations between modules are free. The gradients of two samples
    are compared with those of each sample run alone.

    Second order: all modules are in ``LAYERS`` or ``PLAIN``, and each one's input is the output of
    another module or a sum of such outputs, as behind a residual connection.

    Args:
        problem: The model, and a batch to try it on.
        second_order: Whether second derivatives are requested.
        curvature: Whether the diagonal of the Hessian is one of them. One sample's largest entries
            are then compared with double backward, and the diagonal must fit into ``memory_mb``.

    Returns:
        Path -> reason; empty inside of the domain. The path "" is the model as a whole.
    """
    trainable = trainable_modules(problem.twin)
    concerned = dict(trainable)
    if second_order:
        concerned |= {p: m for p, m in problem.twin.named_modules() if not list(m.children())}
    reasons = _static_reasons(problem.twin, trainable, second_order)
    with torch.enable_grad():
        for size in (2, 3):  # the first dimension of a module's input must follow both sizes
            rows = torch.arange(size) % problem.batch.size
            for path, reason in check_calls(problem, rows, concerned, second_order).items():
                reasons.setdefault(path, reason)
        if not reasons:
            exact = second_order and curvature
            reasons = compare_curvature(problem) if exact else compare_gradients(problem)
    return reasons


def check_domain(problem: Problem, *, second_order: bool, curvature: bool = True) -> None:
    """Raise FimprobeError outside of the domain.

    Args:
        problem: The model, and a batch to try it on.
        second_order: Whether second derivatives are requested.
        curvature: Whether the diagonal of the Hessian is one of them.

    Raises:
        FimprobeError: If :func:`offending_modules` finds a module.
    """
    reasons = offending_modules(problem, second_order=second_order, curvature=curvature)
    if reasons:
        listed = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in reasons.items())
        remedy = "second_order={'probes': 2}" if second_order else "engine='autograd'"
        raise FimprobeError(f"engine='backpack' is not verified for {listed}. Pass {remedy} instead.")


def _static_reasons(
    twin: nn.Module, trainable: list[tuple[str, nn.Module]], second_order: bool
) -> dict[str, str]:
    """The modules that are outside of the domain whatever a forward pass does, with reasons."""
    reasons: dict[str, str] = {}
    kinds = {p.dtype for p in twin.parameters()}
    if second_order and not kinds <= {torch.float32, torch.float64}:
        reasons[""] = f"parameters of type {sorted(map(str, kinds))}"
    for path, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            reasons[path] = f"{type(module).__name__} with the batch's statistics"
    owners: dict[int, list[str]] = {}
    for path, module in trainable:
        for p in _trainable_parameters(module):
            owners.setdefault(id(p), []).append(path)
    for path, module in trainable:
        reason = module_reason(module, second_order=second_order)
        # tied between modules or within one
        shared = [owners[id(p)] for p in _trainable_parameters(module) if len(owners[id(p)]) > 1]
        if shared and reason is None:
            reason = f"shares a parameter: {sorted(set(shared[0]))}"
        if reason is not None:
            reasons.setdefault(path, reason)
    return reasons


def _trainable_parameters(module: nn.Module) -> list[Any]:
    """Trainable parameters that a module owns; one with two names is listed twice."""
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]
