"""The verified domain: where BackPACK is right, and why a model is outside of it."""

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
    """Path -> reason for every module outside of the domain that the tests verify; empty inside.

    First order: each trainable parameter belongs to one module of ``LAYERS`` (exactly that class,
    with options that BackPACK knows), which is called once, on one tensor, with the samples first,
    and uses it once; whatever happens between modules is free. The gradients of two samples are
    compared with those of the samples run alone. Second order: all modules of ``LAYERS`` or
    ``PLAIN`` and in a chain, each one's input being the output of the one before; of the Hessian's
    diagonal (not asked for with ``curvature=False``), one sample's largest entries are compared
    with double backward, and it must fit ``memory_mb``. The path "" stands for the model as a
    whole.
    """
    trainable = trainable_modules(problem.twin)
    concerned = dict(trainable)
    if second_order:
        concerned |= {p: m for p, m in problem.twin.named_modules() if not list(m.children())}
    found = _standing_reasons(problem.twin, trainable, second_order)
    with torch.enable_grad():
        for size in (2, 3):  # sizes that a module's first dimension must follow
            rows = torch.arange(size) % problem.batch.size
            for path, reason in check_calls(problem, rows, concerned, second_order).items():
                found.setdefault(path, reason)
        if not found:
            exact = second_order and curvature
            found = compare_curvature(problem) if exact else compare_gradients(problem)
    return found


def check_domain(problem: Problem, *, second_order: bool, curvature: bool = True) -> None:
    """Raise FimprobeError outside of the domain, naming every module and a remedy."""
    found = offending_modules(problem, second_order=second_order, curvature=curvature)
    if found:
        listed = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in found.items())
        remedy = "second_order={'probes': 2}" if second_order else "engine='autograd'"
        raise FimprobeError(f"engine='backpack' is not verified for {listed}. Pass {remedy} instead")


def _standing_reasons(
    twin: nn.Module, trainable: list[tuple[str, nn.Module]], second_order: bool
) -> dict[str, str]:
    """What is outside before any forward pass."""
    found: dict[str, str] = {}
    kinds = {p.dtype for p in twin.parameters()}
    if second_order and not kinds <= {torch.float32, torch.float64}:
        found[""] = f"parameters of type {sorted(map(str, kinds))}"
    for path, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            found[path] = f"{type(module).__name__} with the batch's statistics"
    owners: dict[int, list[str]] = {}
    for path, module in trainable:
        for p in _own(module):
            owners.setdefault(id(p), []).append(path)
    for path, module in trainable:
        reason = module_reason(module, second_order=second_order)
        # tied between modules or within one
        shared = [owners[id(p)] for p in _own(module) if len(owners[id(p)]) > 1]
        if shared and reason is None:
            reason = f"shares a parameter: {sorted(set(shared[0]))}"
        if reason is not None:
            found.setdefault(path, reason)
    return found


def _own(module: nn.Module) -> list[Any]:
    """A module's own trainable parameters; a parameter under two names twice."""
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]
