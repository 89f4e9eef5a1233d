"""Traits of an object's type that decide whether and how the object can be copied."""

from __future__ import annotations

import copyreg
import functools
import types
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError

ATOMS = {
    type(None), bool, int, float, complex, str, bytes, type, range, slice, type(Ellipsis),
    type(NotImplemented), torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
    types.ModuleType, types.CodeType, types.GenericAlias,
}  # fmt: skip
"""Types whose objects never change."""


class OneShot:
    """A stand-in for a Python generator, which cannot be copied and must not be advanced."""

    def __init__(self, kind: str) -> None:
        self.__dict__["_kind"] = kind

    def __iter__(self) -> OneShot:
        """Return the object itself, as iterators do."""
        return self

    def __next__(self) -> Any:
        """Refuse to advance.

        Raises:
            FimprobeError: Always.
        """
        raise FimprobeError(
            f"the model's forward reads from a Python {self._kind}, which cannot be copied, and "
            "reading from it here would change the training. Pass the values as an input of the "
            "model."
        )

    def __getattr__(self, name: str) -> Any:
        """Refuse ``send``, ``close`` and the like."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__next__


@functools.cache
def global_names(code: types.CodeType) -> frozenset[str]:
    """Names that a function, or one written inside of it, may look up as global variables."""
    inner = [global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.cache
def plainly_copied(kind: Any) -> bool:
    """Return whether a copy is an empty object with copies of the attributes."""
    plain = ("__reduce_ex__", "__reduce__", "__new__", "__getstate__")
    return (
        all(getattr(kind, name, None) is getattr(object, name, None) for name in plain)
        and not any(
            hasattr(kind, name)
            for name in ("__deepcopy__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
        )
        and not any("__slots__" in base.__dict__ for base in kind.__mro__)
        and kind.__dictoffset__ != 0
        and kind not in copyreg.dispatch_table
    )


def is_plain_data(values: Any) -> bool:
    """Return whether a long container holds only plain values.

    These are numbers, texts, tensors without gradient, and tuples of them. The elements can be shared
    then. The container is searched level by level, which is fast.
    """
    level = list(values)
    for _ in range(4):
        kinds = set(map(type, level))
        if Tensor in kinds:
            if any(x.requires_grad for x in level if type(x) is Tensor):
                return False
            kinds.discard(Tensor)
        if kinds <= ATOMS:
            return True
        if not kinds <= ATOMS | {tuple}:
            return False
        level = list(chain.from_iterable(x for x in level if type(x) is tuple))
    return False
