"""Forward hooks of the probe, which an export or a copy of the model does not meet."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

_KEY = "fimprobe"
"""Key of the probe's hooks; torch's are numbers, which may be used again in another process."""


class _HookTable(OrderedDict):  # type: ignore[type-arg]
    """The table of a module's hooks, in which ``values`` and copies leave the probe's hook out.

    A call of the module reads ``items``. ``torch.jit.script`` compiles ``values``.

    Args:
        replaced: The empty table whose place it takes.
    """

    def __init__(self, replaced: OrderedDict[Any, Any]) -> None:
        super().__init__()
        self.replaced = replaced

    def values(self) -> Any:
        """Return the other hooks."""
        return [hook for key, hook in self.items() if key != _KEY]

    def __reduce__(self) -> Any:
        """Pickle and copy as torch's own table, without the probe's hook."""
        others = OrderedDict((key, hook) for key, hook in self.items() if key != _KEY)
        return others.__reduce__()

    def copy(self) -> Any:
        """Return torch's own table, without the probe's hook."""
        return OrderedDict((key, hook) for key, hook in self.items() if key != _KEY)


class _Hook:
    """A hook that is pickled and copied as one that does nothing, without this package.

    A table that has hooks already cannot be replaced: their handles refer to it.
    """

    def __init__(self, function: Callable[..., None], name: str) -> None:
        self._function, self.__name__ = function, name

    def __call__(self, *call: Any) -> None:
        """Run the hook."""
        self._function(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as a function of Python that takes any arguments and returns None."""
        return getattr, (contextlib.nullcontext(), "__exit__")


def set_hooks(model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Have a module call two functions around its forward, with keyword arguments.

    Args:
        model: The module.
        before: Called with (module, args, kwargs).
        after: Called with (module, args, kwargs, output).
    """
    hooks = {"_forward_pre_hooks": before, "_forward_hooks": after}
    for name, function in hooks.items():
        table = getattr(model, name)
        if not table and type(table) is OrderedDict:
            # the probe's hook is not to be a part of what an export sees
            table = model.__dict__[name] = _HookTable(table)
        table[_KEY] = _Hook(function, f"fimprobe{name}")
        getattr(model, f"{name}_with_kwargs")[_KEY] = True


def remove_hooks(model: nn.Module) -> None:
    """Remove what :func:`set_hooks` set. Calling it again does nothing."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        table = getattr(model, name)
        table.pop(_KEY, None)
        getattr(model, f"{name}_with_kwargs").pop(_KEY, None)
        if not table and type(table) is _HookTable:
            model.__dict__[name] = table.replaced
