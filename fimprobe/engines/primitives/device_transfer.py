"""One transfer from the device for everything that a report needs."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Tree = TypeVar("Tree")


def to_host(tree: Tree) -> Tree:
    """The same containers with every tensor on the CPU, in its own type and shape.

    Each ``.cpu()`` waits for all that a GPU was told to do; here there is one for each device, of all
    values behind one another in float64 (whole numbers beyond 2^53 do not come through).

    >>> fetch({"a": [torch.ones(2, dtype=torch.int64), None], "b": torch.zeros(())})
    {'a': [tensor([1, 1]), None], 'b': tensor(0.)}
    """
    leaves, form = tree_flatten(tree)
    devices: dict[torch.device, list[int]] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.device.type != "cpu":
            devices.setdefault(x.device, []).append(i)
    for places in devices.values():  # more than one where a model is spread over several
        values = torch.cat([leaves[i].reshape(-1).double() for i in places]).cpu()
        parts = values.split([leaves[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            leaves[i] = part.to(leaves[i].dtype).view(leaves[i].shape)
    found: Tree = tree_unflatten(leaves, form)
    return found


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device; a GPU takes it from pinned memory, which nobody waits for."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
