"""Drops tensors that a forward keeps on its modules, since they belong to that one evaluation.

Some models keep what they compute from parameters while in eval mode: attention biases by device
(LeViT and EfficientFormerV2 of timm), a merged weight, a loss of a router. The next evaluation would
use the tensor of the one before, whose graph was freed by its backward pass, or which has no graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_ATTRIBUTES_OF_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def dropping_leftovers(model: nn.Module) -> Iterator[None]:
    """Remove the tensors that an evaluation adds to its modules.

    These are attributes that did not exist or were None, and new items of dictionaries and lists. An
    attribute that held a tensor before is left: weight normalisation writes its weight there.

    Args:
        model: The twin, or the module of it that is evaluated.
    """
    # BackPACK's hooks keep inputs and outputs on the modules that it extends, for its backward pass
    states = [vars(module) for module in model.modules() if "_backpack_extend" not in vars(module)]
    before = [(attributes, _contents(attributes)) for attributes in states]
    try:
        yield
    finally:
        for attributes, contents in before:
            _restore(attributes, contents)


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module that are not torch's; of containers, the keys or the length."""
    return {name: _extent(x) for name, x in attributes.items() if name not in _ATTRIBUTES_OF_TORCH}


def _extent(value: Any) -> Any:
    if type(value) is dict:
        return frozenset(value)
    return len(value) if type(value) is list else value


def _restore(attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    for name, value in list(attributes.items()):
        if name in _ATTRIBUTES_OF_TORCH:
            continue
        extent = contents.get(name)
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
