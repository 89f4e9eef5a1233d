"""The optimizers of a model, and the closures that they are called with."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(kw_only=True)
class _Answer:
    """Whether an optimizer holds parameters of the model, when it was last searched."""

    holds: bool
    num_groups: int
    num_reuses: int


class OptimizerFilter:
    """Selects the optimizers that hold parameters of a model.

    Searching all parameters at every step would cost most of a step that is not measured, so answers
    are kept. They are renewed if the optimizer gained or lost a group, and at a step that is measured
    (``refresh``). New parameters of the model may change a negative answer: it is renewed after
    1, 2, 4, 8, ... steps too.
    """

    def __init__(self) -> None:
        self._answers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Answer] = (
            weakref.WeakKeyDictionary()
        )

    def matches(self, optimizer: torch.optim.Optimizer, model: nn.Module, *, refresh: bool) -> bool:
        """Return whether the optimizer holds any parameter of the model.

        Args:
            optimizer: Any optimizer.
            model: The model, always the same one.
            refresh: Whether to search again in any case.
        """
        num_groups = len(optimizer.param_groups)
        answer = self._answers.get(optimizer)
        if answer is not None and answer.num_groups != num_groups:
            answer = None
        if answer is not None and not refresh:
            if answer.holds:
                return True
            answer.num_reuses += 1
            is_power_of_two = answer.num_reuses & (answer.num_reuses - 1) == 0
            if not is_power_of_two:
                return False
        holds = holds_parameters(optimizer, model)
        num_reuses = 0 if answer is None else answer.num_reuses
        self._answers[optimizer] = _Answer(holds=holds, num_groups=num_groups, num_reuses=num_reuses)
        return holds


def holds_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Return whether the optimizer holds any parameter of the model.

    Args:
        optimizer: Any optimizer.
        model: The model.
    """
    ids = {id(p) for p in model.parameters()}
    return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])


class ClosureOrder:
    """Knows which optimizers call their closure before they move the parameters.

    Those of torch do. Another one is observed at a measured step; until then it is assumed to move
    the parameters first, as sharpness-aware optimizers do.
    """

    def __init__(self) -> None:
        self._closure_first: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def closure_comes_first(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer is known to call its closure first."""
        # a subclass with a step of its own may do otherwise
        step = inspect.unwrap(type(optimizer).step)
        return step.__module__.startswith("torch.optim.") or optimizer in self._closure_first

    def record_closure_first(self, optimizer: torch.optim.Optimizer) -> None:
        """Record that the optimizer called its closure first."""
        self._closure_first.add(optimizer)


def parameter_versions(model: nn.Module) -> list[int]:
    """Return the version counters of all parameters, which grow when they are written to."""
    return [p._version for p in model.parameters()]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of ``optimizer.step``, of which the first is the optimizer."""


def find_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """Return the closure of ``optimizer.step(closure)``, or None.

    Args:
        args: Positional arguments of ``step``, the optimizer itself first.
        kwargs: Keyword arguments of ``step``.
    """
    closure = args[1] if len(args) > 1 and callable(args[1]) else kwargs.get("closure")
    return closure if callable(closure) else None


def replace_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> Arguments:
    """Return the arguments of ``optimizer.step`` with another closure.

    Args:
        args: Positional arguments, the optimizer itself first.
        kwargs: Keyword arguments.
        closure: Takes the place of the present one.
    """
    if len(args) > 1 and callable(args[1]):
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
