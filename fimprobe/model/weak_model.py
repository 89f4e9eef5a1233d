"""An attribute for a model that must be freed when its training drops it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from fimprobe.errors import FimprobeError


class WeakModel:
    """A descriptor: the attribute is the module that was assigned, without keeping it alive.

    A model holds its hooks, and these hold the probe. A strong reference back would leave the memory
    of a dropped model to the garbage collector, which may let the next model run out of memory.

    >>> class Watcher:
    ...     model = WeakModel()
    >>> watcher, net = Watcher(), nn.Linear(2, 1)
    >>> watcher.model = net
    >>> watcher.model is net
    True
    """

    def __set_name__(self, owner: type, name: str) -> None:
        """Store the name under which the reference is kept."""
        self._key = f"_weak_{name}"

    def __set__(self, instance: Any, model: nn.Module) -> None:
        """Refer to a module."""
        instance.__dict__[self._key] = weakref.ref(model)

    def __get__(self, instance: Any, owner: type) -> Any:
        """Return the module.

        Raises:
            FimprobeError: If it was freed.
        """
        if instance is None:
            return self
        model = instance.__dict__[self._key]()
        if model is None:
            raise FimprobeError("the model was freed, and with it what the probe measures")
        return model
