"""Calls the probe before the steps of optimizers: by a hook on one, or by torch's global table.

The global table has one hook of this process, which is registered once and stays: torch iterates
over the table while a hook measures, and a change to it meanwhile would end the training of that
thread. Without a probe the hook does nothing. It holds no probe.

In a step that ``torch.compile`` compiles, hooks are compiled with it. They would measure at compile
time only, or compile the measurement. Steps of torch's optimizers break the graph themselves: there,
the hook is called between two graphs (:func:`_outside_of_graphs`). In steps of other optimizers it is
left out, since a break is an error where a whole graph is requested; what they change is noticed by
``training/unseen_steps.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fimprobe.errors import BatchError, guarded
from fimprobe.probe.optimizers import (
    Arguments,
    ClosureOrder,
    OptimizerFilter,
    find_closure,
    parameter_versions,
    replace_closure,
)
from fimprobe.probe.probe import Probe

_listeners: dict[int, weakref.ref[StepListener]] = {}
"""The listeners that wait for optimizers of their model, by their identity."""

_Hook = Callable[[torch.optim.Optimizer, tuple[Any, ...], dict[str, Any]], "Arguments | None"]

_registered: list[Any] = []
"""The handle of the global hook, once it is registered."""


def trigger_by_optimizers(probe: Probe, only: torch.optim.Optimizer | None) -> None:
    """Call ``probe.step`` before each step of the model's optimizers, or of ``only`` that one.

    Args:
        probe: The probe, which is not kept alive.
        only: The optimizer that is hooked; None for all that hold parameters of the model.
    """
    listener = StepListener(probe)
    if only is not None:
        # torch holds the hook; while the optimizer steps its table must not change
        handle = only.register_step_pre_hook(_outside_of_graphs(listener.before_step))
        probe.on_detach(partial(_remove_unless_stepping, listener, handle))
        return
    if not _registered:
        hook = _outside_of_graphs(_before_any_step)
        _registered.append(register_optimizer_step_pre_hook(hook))
    _listeners[id(listener)] = weakref.ref(listener)
    probe.on_detach(listener.stop)


def _remove_unless_stepping(listener: StepListener, handle: Any) -> None:
    if not listener.is_stepping:
        handle.remove()


def _outside_of_graphs(hook: _Hook) -> _Hook:
    """Return a hook that is not compiled with the step of an optimizer.

    Args:
        hook: Called with (optimizer, args, kwargs).
    """
    between_graphs = torch.compiler.disable(hook)

    def before_step(
        optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if not torch.compiler.is_compiling():
            return hook(optimizer, args, kwargs)
        if type(optimizer).__module__.startswith("torch.optim."):
            return between_graphs(optimizer, args, kwargs)
        return None

    return before_step


def _before_any_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Inform all listeners.

    Args:
        optimizer: Any optimizer of the process.
        args: Positional arguments of its ``step``, the optimizer first.
        kwargs: Keyword arguments of its ``step``.

    Returns:
        Arguments with an observed closure; None to leave them as they are.
    """
    replaced = None
    for reference in list(_listeners.values()):
        listener = reference()
        if listener is not None and listener.matches(optimizer):
            changed = listener.before_step(optimizer, args, kwargs)
            if changed is not None:
                replaced = args, kwargs = changed
    return replaced


class StepListener:
    """Measures before the steps of optimizers, or in their closures.

    Args:
        probe: The probe, which is not kept alive.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = weakref.ref(probe)
        self.errors = probe.errors
        self.is_stepping = False
        self._filter, self._order = OptimizerFilter(), ClosureOrder()

    def stop(self) -> None:
        """Leave the list of listeners."""
        _listeners.pop(id(self), None)

    @guarded(defers=False)
    def matches(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer holds parameters of the model."""
        probe = self._probe()
        if probe is None or probe.detached:
            return False
        return self._filter.matches(optimizer, probe.model, refresh=probe.due)

    @guarded(defers=False)
    def before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Measure before the step of an optimizer of the model, or in its closure.

        Args:
            optimizer: The optimizer.
            args: Positional arguments of its ``step``, the optimizer first.
            kwargs: Keyword arguments of its ``step``.

        Returns:
            Arguments with an observed closure; None to leave them as they are.
        """
        probe = self._probe()
        if probe is None or probe.detached:
            return None
        # GradScaler sets it on a fused optimizer, which skips the step itself
        step = partial(probe.step, found_inf=getattr(optimizer, "found_inf", None))
        closure = find_closure(args, kwargs)
        self.is_stepping = True
        try:
            if closure is None:
                step()
                return None
            observed = _ObservedClosure(probe, optimizer, step, closure, self._order)
            return replace_closure(args, kwargs, observed)
        finally:
            self.is_stepping = False


class _ObservedClosure:
    """A closure that calls ``step`` once, at the parameters before the optimizer's step.

    Args:
        probe: The probe.
        optimizer: The optimizer that calls the closure.
        step: Measures the captured batch if it is due.
        closure: The closure that the loop passed.
        order: Which optimizers move the parameters before they call their closure.
    """

    def __init__(
        self,
        probe: Probe,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Any],
        closure: Callable[[], Any],
        order: ClosureOrder,
    ) -> None:
        self._probe, self._optimizer, self._order = probe, optimizer, order
        self._step, self._closure = step, closure
        self.errors = probe.errors
        self._versions = parameter_versions(probe.model) if probe.due else []
        self._pending = True
        self._moved = False
        if probe.backward_done and not order.closure_comes_first(optimizer):
            # sharpness-aware optimizers: the gradients exist, and the parameters move before the
            # closure
            step()
            self._pending = False

    def __call__(self) -> Any:
        """Evaluate the closure of the loop."""
        self._before()
        loss = self._closure()
        self._after()
        return loss

    @guarded()
    def _before(self) -> None:
        versions, self._versions = self._versions, []
        self._moved = bool(versions) and versions != parameter_versions(self._probe.model)
        if versions and not self._moved:
            self._order.record_closure_first(self._optimizer)

    @guarded(defers=False)
    def _after(self) -> None:
        if not self._pending:
            self._probe.discard_batch()  # later evaluations are at other parameters
            return
        self._pending = False
        if self._moved:
            self._probe.discard_batch(
                BatchError(
                    "the optimizer changed the parameters before it called its closure. Call "
                    "backward before optimizer.step(closure), or probe.step(inputs) yourself."
                )
            )
        self._step()
