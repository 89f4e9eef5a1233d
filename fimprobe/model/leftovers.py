"""Drops tensors that a forward keeps on its modules, since they belong to that one evaluation.

Some models keep what they compute from parameters while in eval mode: attention biases by device
(LeViT and EfficientFormerV2 of timm), a merged weight, a loss of a router. The next evaluation would
use the tensor of the one before, whose graph was freed by its backward pass, or which has no graph.
Until then they stay: hooks read in a backward pass what its forward kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_ATTRIBUTES_OF_TORCH = frozenset(vars(nn.Module()))

_Contents = dict[str, Any]
"""The attributes of a module that are not torch's; of containers, the keys or the length."""

_before: WeakKeyDictionary[nn.Module, _Contents] = WeakKeyDictionary()
"""What modules of twins held before their first evaluation."""


def drop_leftovers(modules: Iterable[nn.Module]) -> None:
    """Remove the tensors that earlier evaluations added to modules, right before the next one.

    These are attributes that did not exist or were None before the first evaluation, and new items of
    dictionaries and lists. An attribute that held a tensor is left: weight normalisation writes its
    weight there.

    Args:
        modules: Those of the twin, or those inside of the one that is evaluated.
    """
    for module in modules:
        contents = _before.get(module)
        if contents is None:
            _before[module] = _contents_of(module)
        else:
            _restore(module, contents)


@contextmanager
def dropping_leftovers(model: nn.Module) -> Iterator[None]:
    """Remove the tensors that an evaluation adds, after its backward pass.

    Args:
        model: A twin, or the user's modules.
    """
    before = {module: _contents_of(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, contents in before.items():
            _restore(module, contents)


@contextmanager
def without_leftovers(module: nn.Module) -> Iterator[None]:
    """Evaluate a module of a twin inside of a forward of the twin, which goes on as it was.

    Args:
        module: It has none of the tensors that the forward added so far, and gets them back.
    """
    held = {
        part: {n: x for n, x in vars(part).items() if n not in _ATTRIBUTES_OF_TORCH}
        for part in module.modules()
    }
    items = [(x, x.copy()) for own in held.values() for x in own.values() if type(x) in (dict, list)]
    drop_leftovers(module.modules())
    try:
        yield
    finally:
        for part, own in held.items():
            for name in [n for n in vars(part) if n not in own and n not in _ATTRIBUTES_OF_TORCH]:
                del vars(part)[name]
            vars(part).update(own)
        for container, copied in items:
            container.clear()
            (container.update if isinstance(container, dict) else container.extend)(copied)


def _contents_of(module: nn.Module) -> _Contents:
    attributes = vars(module).items()
    return {name: _extent(x) for name, x in attributes if name not in _ATTRIBUTES_OF_TORCH}


def _extent(value: Any) -> Any:
    if type(value) is dict:
        return frozenset(value)
    if type(value) is list:
        return len(value)
    return None if value is None else _HELD


_HELD = object()
"""Stands for any other value, which is not kept alive."""


def _restore(module: nn.Module, contents: _Contents) -> None:
    attributes = vars(module)
    for name in attributes.keys() - _ATTRIBUTES_OF_TORCH:
        value, extent = attributes[name], contents.get(name)
        if type(value) is dict and isinstance(extent, frozenset):
            for key in [k for k, x in value.items() if k not in extent and _is_result(x)]:
                del value[key]
        elif type(value) is list and type(extent) is int:
            if any(map(_is_result, value[extent:])):
                del value[extent:]
        elif extent is None and _is_result(value):
            if name in contents:
                attributes[name] = None
            else:
                del attributes[name]


def _is_result(value: Any) -> bool:
    if value is None or isinstance(value, (str, int, float, nn.Module)):
        return False
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(value))
