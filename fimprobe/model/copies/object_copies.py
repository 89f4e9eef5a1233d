"""Copies of the objects that a model holds: containers, functions with closures, weak references.

``copy.deepcopy`` returns functions, weak references and what shares memory as they are, so that a
copy made by it still reaches the original. :class:`ObjectCopier` follows them.
"""

from __future__ import annotations

import copy
import copyreg
import enum
import functools
import io
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.model.copies.copy_traits import (
    ATOMS,
    OneShot,
    global_names,
    is_plain_data,
    plainly_copied,
)

_NOT_COPIED = (threading.Thread, io.IOBase, torch.futures.Future)
"""What acts on its own, or outside of the process: a copy of it would not work."""

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_MANY = 1000
"""Elements from which it pays to look for containers of plain numbers before copying each element."""

_MOST_OBJECTS = 2_000_000
"""Objects that one attribute may hold; with more it is shared. About two seconds of copying."""

_MISSING = object()


class NotCopiedError(Exception):
    """An object, or something it holds, cannot be copied."""


class ObjectCopier:
    """Copies whatever a model reaches, each object once.

    Args:
        memo: Copies by the identity of the original; entries that exist are used.

    Attributes:
        originals: Every changeable object that was copied, for
            :class:`~fimprobe.model.copies.user_state.UserState`.
        shared: Objects that could not be copied and are the user's own.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.originals: list[Any] = []
        self.shared: list[Any] = []
        self._depth = 0
        self._num_objects = 0

    def copy_module(self, module: nn.Module) -> nn.Module:
        """Return a copy of a module that is not in ``memo``."""
        raise NotImplementedError

    def copy_tensor(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor that is not in ``memo``."""
        raise NotImplementedError

    def is_followed(self, referent: object) -> bool:
        """Return whether a weak reference to this object is to become one to its copy."""
        return id(referent) in self.memo

    def copy(self, value: Any) -> Any:
        """Return the copy of a value; of one that never changes, the value itself."""
        kind = type(value)
        if kind in ATOMS:
            return value
        copied = self.memo.get(id(value), _MISSING)
        if copied is not _MISSING:
            return copied
        if isinstance(value, nn.Module):
            return self.copy_module(value)
        if isinstance(value, Tensor):
            return self.add(value, self.copy_tensor(value))
        copier: Callable[[ObjectCopier, Any], Any] | None = _COPIERS.get(kind)
        if copier is not None:
            return copier(self, value)
        return self._copy_object(value)

    def add(self, original: Any, copied: Any) -> Any:
        """Register a copy and return it.

        Args:
            original: The object of the user.
            copied: Its copy.

        Raises:
            NotCopiedError: If an object of an unknown class has too many parts.
        """
        self._num_objects += 1
        if self._num_objects > _MOST_OBJECTS and self._depth:
            raise NotCopiedError
        self.memo[id(original)] = copied
        self.originals.append(original)
        return copied

    def _copy_object(self, value: Any) -> Any:
        """Copy an object of any class, or share it as a whole where a part of it cannot be copied."""
        kind = type(value)
        if isinstance(value, (enum.Enum, type, types.BuiltinFunctionType)):
            return (
                self._copy_builtin(value) if isinstance(value, types.BuiltinFunctionType) else value
            )
        if self._depth:
            return self._reduce(value, kind)
        known, visited = len(self.memo), len(self.originals)
        self._depth, self._num_objects = 1, 0
        try:
            return self._reduce(value, kind)
        except FimprobeError:
            raise
        except Exception:  # classes raise what they like where they cannot be copied
            for key in list(self.memo)[known:]:
                del self.memo[key]
            del self.originals[visited:]
            self.shared.append(value)
            self.memo[id(value)] = value  # kept alive by ``shared``: the key stays its own
            return value
        finally:
            self._depth = 0

    def _copy_builtin(self, value: Any) -> Any:
        """A method of a container: that of the container's copy."""
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            return value
        return getattr(self.copy(owner), value.__name__)

    def _reduce(self, value: Any, kind: Any) -> Any:
        if isinstance(value, _NOT_COPIED):
            raise NotCopiedError
        if plainly_copied(kind):
            copied = self.add(value, kind.__new__(kind))
            for name, part in value.__dict__.items():
                copied.__dict__[name] = part if type(part) in ATOMS else self.copy(part)
            return copied
        own = getattr(kind, "__deepcopy__", None)
        if own is not None:
            return self.add(value, own(value, self.memo))
        reducer = copyreg.dispatch_table.get(kind)
        reduced = reducer(value) if reducer is not None else value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return value
        return self._rebuild(value, *reduced)

    def _rebuild(self, value: Any, function: Any, args: Any, state: Any = None, *items: Any) -> Any:
        """An object from what its class gives to ``pickle``."""
        copied = self.add(value, function(*(self.copy(x) for x in args)))
        if state is not None:
            state = self.copy(state)
            if hasattr(copied, "__setstate__"):
                copied.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) else (state, None)
                copied.__dict__.update(attributes or {})
                for name, part in (slots or {}).items():
                    setattr(copied, name, part)
        elements, pairs = (*items, None, None)[:2]
        for element in elements or ():
            copied.append(self.copy(element))
        for key, part in pairs or ():
            copied[self.copy(key)] = self.copy(part)
        return copied

    # containers and functions, by type

    def _copy_dict(self, value: Any) -> Any:
        kind: Any = type(value)
        copied = kind(value.default_factory) if kind is defaultdict else kind()
        self.add(value, copied)
        for key, part in value.items():
            key = key if type(key) in ATOMS else self.copy(key)
            copied[key] = part if type(part) in ATOMS else self.copy(part)
        return copied

    def _copy_sequence(self, value: Any) -> Any:
        if len(value) >= _MANY and is_plain_data(value):
            return self.add(value, copy.copy(value))
        kind: Any = type(value)
        copied = kind(maxlen=value.maxlen) if kind is deque else kind()
        self.add(value, copied)
        for part in value:
            copied.append(part if type(part) in ATOMS else self.copy(part))
        return copied

    def _copy_set(self, value: set[Any]) -> Any:
        copied = self.add(value, set())
        copied.update(part if type(part) in ATOMS else self.copy(part) for part in value)
        return copied

    def _copy_tuple(self, value: tuple[Any, ...]) -> Any:
        parts = [part if type(part) in ATOMS else self.copy(part) for part in value]
        known = self.memo.get(id(value))  # a tuple that contains itself through a list
        if known is not None:
            return known
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return self.add(value, tuple(parts))

    def _copy_function(self, value: types.FunctionType) -> Any:
        namespace = self._copy_globals(value)
        if namespace is value.__globals__ and not (
            value.__closure__ or value.__defaults__ or value.__kwdefaults__ or value.__dict__
        ):
            return value
        cells = tuple(self._copy_cell(cell) for cell in value.__closure__ or ())
        if id(value) in self.memo:  # a function that refers to itself
            return self.memo[id(value)]
        copied = types.FunctionType(value.__code__, namespace, value.__name__, None, cells or None)
        self.add(value, copied)
        copied.__defaults__ = self.copy(value.__defaults__)
        copied.__kwdefaults__ = self.copy(value.__kwdefaults__)
        copied.__qualname__, copied.__module__ = value.__qualname__, value.__module__
        copied.__doc__, copied.__annotations__ = value.__doc__, value.__annotations__
        copied.__dict__.update({k: self.copy(v) for k, v in value.__dict__.items()})
        return copied

    def _copy_globals(self, value: types.FunctionType) -> dict[str, Any]:
        """Global variables of a copied function, with copies of the model's modules."""
        known = value.__globals__
        followed = {
            name: known[name]
            for name in global_names(value.__code__)
            if name in known and self.is_followed(known[name])
        }
        if not followed:
            return known
        return known | {name: self.copy(x) for name, x in followed.items()}

    def _copy_cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) in self.memo:
            return self.memo[id(cell)]  # type: ignore[no-any-return]
        copied: types.CellType = self.add(cell, types.CellType())
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return copied
        copied.cell_contents = self.copy(content)
        return copied

    def _copy_method(self, value: types.MethodType) -> Any:
        return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))

    def _copy_partial(self, value: functools.partial[Any]) -> Any:
        copied = functools.partial(
            self.copy(value.func),
            *(self.copy(x) for x in value.args),
            **{k: self.copy(x) for k, x in value.keywords.items()},
        )
        copied.__dict__.update({k: self.copy(v) for k, v in value.__dict__.items()})
        return self.add(value, copied)

    def _copy_weak(self, value: weakref.ref[Any]) -> Any:
        referent = value()
        if referent is None or not self.is_followed(referent):
            return value
        return weakref.ref(self.copy(referent))

    def _copy_weak_dict(self, value: Any) -> Any:
        copied = self.add(value, type(value)())
        for key, part in list(value.items()):
            key = self.copy(key) if self.is_followed(key) else key
            if type(value) is weakref.WeakValueDictionary:
                copied[key] = self.copy(part) if self.is_followed(part) else part
            else:
                copied[key] = self.copy(part)
        return copied

    def _copy_weak_set(self, value: Any) -> Any:
        copied = self.add(value, weakref.WeakSet())
        for part in list(value):
            copied.add(self.copy(part) if self.is_followed(part) else part)
        return copied

    def _copy_view(self, value: types.MappingProxyType[Any, Any]) -> Any:
        return types.MappingProxyType(self.copy(dict(value)))

    def _copy_lock(self, value: Any) -> Any:
        """A lock of its own, not held: the user's may be held by whoever calls the probe."""
        return self.add(
            value, threading.Lock() if isinstance(value, _LOCKS[0]) else threading.RLock()
        )

    def _copy_local(self, value: threading.local) -> Any:
        copied = self.add(value, threading.local())
        copied.__dict__.update({k: self.copy(v) for k, v in value.__dict__.items()})
        return copied

    def _copy_random(self, value: torch.Generator) -> Any:
        copied = torch.Generator(device=value.device)
        copied.set_state(value.get_state())
        return self.add(value, copied)

    def _copy_generator(self, value: Any) -> Any:
        return self.add(value, OneShot(type(value).__name__.replace("_", " ")))


_COPIERS: Mapping[Any, Any] = {
    dict: ObjectCopier._copy_dict,
    OrderedDict: ObjectCopier._copy_dict,
    defaultdict: ObjectCopier._copy_dict,
    list: ObjectCopier._copy_sequence,
    deque: ObjectCopier._copy_sequence,
    set: ObjectCopier._copy_set,
    tuple: ObjectCopier._copy_tuple,
    types.FunctionType: ObjectCopier._copy_function,
    types.MethodType: ObjectCopier._copy_method,
    types.CellType: ObjectCopier._copy_cell,
    functools.partial: ObjectCopier._copy_partial,
    weakref.ref: ObjectCopier._copy_weak,
    weakref.WeakKeyDictionary: ObjectCopier._copy_weak_dict,
    weakref.WeakValueDictionary: ObjectCopier._copy_weak_dict,
    weakref.WeakSet: ObjectCopier._copy_weak_set,
    types.MappingProxyType: ObjectCopier._copy_view,
    _LOCKS[0]: ObjectCopier._copy_lock,
    _LOCKS[1]: ObjectCopier._copy_lock,
    threading.local: ObjectCopier._copy_local,
    torch.Generator: ObjectCopier._copy_random,
    types.GeneratorType: ObjectCopier._copy_generator,
}
