"""Contents of the user's objects, so that a change of them can be named and undone."""

from __future__ import annotations

import operator
import pickle
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, deque)
_PLAIN = (dict, OrderedDict)
_LARGEST_TENSOR = 2**24
"""Elements up to which a plain tensor is kept, to be restored."""


class UserState:
    """The contents of changeable objects at one moment, one level deep each.

    Args:
        objects: All objects that are watched, as an
            :class:`~fimprobe.model.copies.object_copies.ObjectCopier` lists them: what one of them
            contains is in the list too.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._contents = [(x, _contents(x)) for x in objects]

    def changes(self) -> list[Any]:
        """Return the objects that hold something else now."""
        return [x for x, before in self._contents if not _equal(_contents(x), before)]

    def restore(self) -> list[Any]:
        """Give each changed object its contents of that moment; return the changed objects."""
        changed = []
        for x, before in self._contents:
            if not _equal(_contents(x), before):
                changed.append(x)
                _restore(x, before)
        return changed


def _contents(x: Any) -> Any:
    if type(x) in _PLAIN:  # most of a model's objects
        return _flat(x)
    if isinstance(x, Tensor):
        return None if isinstance(x, nn.Parameter) or not _is_small(x) else x.detach().clone()
    if isinstance(x, _CONTAINERS):
        return _flat(x) if isinstance(x, dict) else list(x)
    if isinstance(x, types.CellType):
        try:
            return [x.cell_contents]
        except ValueError:
            return []
    if isinstance(x, torch.Generator):
        return x.get_state()
    if isinstance(x, random.Random):
        return x.getstate()
    if _draws_by_numpy(x):
        state = x.bit_generator.state if hasattr(x, "bit_generator") else x.get_state(legacy=False)
        return pickle.dumps(state)  # arrays are compared as bytes
    attributes = getattr(x, "__dict__", None)
    return _flat(attributes) if type(attributes) is dict else None


def _flat(x: dict[Any, Any]) -> list[Any]:
    """The keys, then the values: lists of pairs would take longer to compare."""
    return [*x, *x.values()]


def _unflat(contents: list[Any]) -> dict[Any, Any]:
    half = len(contents) // 2
    return dict(zip(contents[:half], contents[half:], strict=True))


def _draws_by_numpy(x: Any) -> bool:
    """Return whether an object is a source of random numbers of numpy, which need not be loaded."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, (numpy.random.Generator, numpy.random.RandomState))


def _equal(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor):
        return _same_values(now, before)
    if not isinstance(now, list):
        return bool(now == before)
    if len(now) != len(before):
        return False
    if all(map(operator.is_, now, before)):
        return True
    return all(
        a is b or (type(a) is tuple and type(b) is tuple and _same_items(a, b))
        for a, b in zip(now, before, strict=True)
    )


def _same_items(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _is_small(x: Tensor) -> bool:
    plain = type(x) is Tensor and x.layout == torch.strided and not x.is_quantized
    return plain and x.is_leaf and x.device.type != "meta" and x.numel() <= _LARGEST_TENSOR


def _same_values(now: Tensor, before: Any) -> bool:
    same_kind = isinstance(before, Tensor) and now.shape == before.shape and now.dtype == before.dtype
    if not same_kind:
        return False
    equal = now == before
    if now.is_floating_point() or now.is_complex():
        equal |= now.isnan() & before.isnan()
    return bool(equal.all())


def _restore(x: Any, before: Any) -> None:
    if isinstance(x, Tensor):
        with torch.no_grad():
            x.data = before
    elif isinstance(x, (dict, set)):
        x.clear()
        x.update(_unflat(before) if isinstance(x, dict) else before)
    elif isinstance(x, (list, deque)):
        x.clear()
        x.extend(before)
    elif isinstance(x, types.CellType):
        x.cell_contents = before[0]
    elif isinstance(x, torch.Generator):
        x.set_state(before)
    elif isinstance(x, random.Random):
        x.setstate(before)
    elif _draws_by_numpy(x):
        state = pickle.loads(before)
        if hasattr(x, "bit_generator"):
            x.bit_generator.state = state
        else:
            x.set_state(state)
    elif isinstance(before, list):
        x.__dict__.clear()
        x.__dict__.update(_unflat(before))


def describe(x: Any, model: nn.Module) -> str:
    """Return the place of a changed object in the model, in words.

    Args:
        x: A module, the value of a module's attribute, or any other object.
        model: The model of the user.
    """
    for path, module in model.named_modules():
        if x is module:
            return f"attributes of {path or 'the model'!r}"
        for name, value in module.__dict__.items():
            if x is value:
                return f"`{path + '.' if path else ''}{name}`"
    return f"an object of {type(x).__name__}"
