"""The module that is re-evaluated for a parameter: first the smallest, then its parents."""

from __future__ import annotations

from fimprobe.engines.layers.decompositions import UNROLLED
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError


def fall_back_to_parent(problem: Problem, plan: Plan, reasons: dict[str, str]) -> None:
    """Move parameters to the next larger module around them.

    Args:
        problem: The model.
        plan: Changed in place.
        reasons: Why, by the name of a parameter, or by the path of a module for the parameters that
            are measured there.
    """
    names: set[str] = set()
    for key, reason in reasons.items():
        if key in problem.parameters:
            names.add(key)
            continue
        at_module = _measured_at(problem, plan, key)
        if not at_module:
            raise FimprobeError(
                f"module {key!r} must be recorded, but it cannot be ({reason}). Please report this, "
                "with the model."
            )
        for name in at_module:  # what cannot be recorded cannot be re-evaluated either
            plan.fallbacks.setdefault(name, key)
        names |= at_module
    for name in names:
        plan.fallbacks[name] = _parent_module(problem, plan, name)


def _measured_at(problem: Problem, plan: Plan, path: str) -> set[str]:
    """Names of the parameters that a module is recorded for: not those that its submodules hold.

    A decomposed layer is recorded for all its parameters.
    """
    module = problem.twin.get_submodule(path)
    held = {id(p) for p in module.parameters(recurse=type(module) in UNROLLED)}
    return {
        name
        for name, parameter in problem.parameters.items()
        if (plan.fallbacks.get(name) == path)
        or (name not in plan.fallbacks and id(parameter) in held)
    }


def _parent_module(problem: Problem, plan: Plan, name: str) -> str:
    """Path of the next module at which to measure a parameter.

    First the smallest module that contains all its owners (a tied weight has several), then the
    parent of the last one.
    """
    planned = plan.fallbacks.get(name)
    if planned == "":
        raise FimprobeError(
            f"parameter {name!r} must be reached from the whole model at least, but it is not. "
            "Please report this, with the model."
        )
    if planned is not None:
        return planned.rpartition(".")[0]
    parameter = problem.parameters[name]
    owners = [
        path
        for path, module in problem.twin.named_modules()
        if any(p is parameter for p in module._parameters.values())
    ]
    common = _common_prefix([owner.split(".") if owner else [] for owner in owners])
    module = problem.twin.get_submodule(".".join(common))
    # the only owner was a fallback already if it has no rule for the parameter
    was_fallback = len(owners) == 1 and name.rpartition(".")[2] not in rules_for(module)
    if was_fallback and type(module) not in UNROLLED:
        return ".".join(common[:-1])
    return ".".join(common)


def _common_prefix(paths: list[list[str]]) -> list[str]:
    """The longest list with which all lists start."""
    common = paths[0]
    for path in paths[1:]:
        length = 0
        while length < min(len(common), len(path)) and common[length] == path[length]:
            length += 1
        common = common[:length]
    return common
