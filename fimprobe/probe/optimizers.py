"""Which optimizers train this model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class OptimizerFilter:
    """Which optimizers hold parameters of a model.

    To walk all parameters at every step would cost most of what a step between probes costs. An
    answer is looked up again where the optimizer gained or lost a group, at a step that is measured
    (``afresh``), and a "no", which parameters that the model gains may turn, after 1, 2, 4, 8, ...
    steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[int]] = (
            weakref.WeakKeyDictionary()
        )

    def known(self, optimizer: torch.optim.Optimizer, *, afresh: bool) -> bool:
        """Whether the optimizer holds any."""
        groups = len(optimizer.param_groups)
        found = self._found.get(optimizer)
        if found is not None and found[1] == groups and not afresh:
            if found[0]:
                return True
            found[2] += 1
            if found[2] & (found[2] - 1):
                return False
        asked = 0 if found is None or found[1] != groups else found[2]
        holds = _holds(optimizer, self.model)
        self._found[optimizer] = [holds, groups, asked]
        return holds


def _holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    mine = {id(p) for p in model.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])


def _closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], Any] | None, Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The closure of ``step(closure)``, and how to put another in its place."""
    # args[0] is the optimizer itself
    if len(args) > 1 and callable(args[1]):
        return args[1], lambda new: ((args[0], new, *args[2:]), kwargs)
    if callable(kwargs.get("closure")):
        return kwargs["closure"], lambda new: (args, {**kwargs, "closure": new})
    return None, lambda new: (args, kwargs)
