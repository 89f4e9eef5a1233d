"""Transfers between devices: one fetch for all results of a measurement, uploads without a wait."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Tree = TypeVar("Tree")


def to_host(tree: Tree) -> Tree:
    """Copy nested containers with every tensor on the CPU, types and shapes unchanged.

    Each ``.cpu()`` waits until a GPU has finished all queued work. Here the values of one device are
    concatenated in float64 and fetched once. Integers beyond 2^53 are therefore not exact.

    >>> to_host({"a": [torch.ones(2, dtype=torch.int64), None], "b": torch.zeros(())})
    {'a': [tensor([1, 1]), None], 'b': tensor(0.)}
    """
    leaves, structure = tree_flatten(tree)
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.device.type != "cpu":
            by_device.setdefault(x.device, []).append(i)
    for indices in by_device.values():  # several devices if the model is spread over them
        values = torch.cat([leaves[i].reshape(-1).double() for i in indices]).cpu()
        chunks = values.split([leaves[i].numel() for i in indices])
        for i, chunk in zip(indices, chunks, strict=True):
            leaves[i] = chunk.to(leaves[i].dtype).view(leaves[i].shape)
    on_host: Tree = tree_unflatten(leaves, structure)
    return on_host


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; a GPU copies from pinned memory without blocking the CPU.

    Args:
        x: The tensor.
        device: The device.

    Returns:
        The copy; ``x`` itself if it is on the device already.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
