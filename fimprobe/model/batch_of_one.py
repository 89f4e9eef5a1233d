"""The gradient of BatchNorm for a batch of one sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def correct_gradient_of_one(outputs: Iterable[Tensor]) -> None:
    """Make the cotangents of BatchNorm contiguous in the graph behind some outputs.

    torch 2.13 on a CPU computes a wrong gradient for a batch of one whose cotangent has the strides
    of another memory order, as behind ``flatten(2).transpose(1, 2)``. The same sample in a larger
    batch has the right one. Hooks in the graph leave the forward as it is, which a mode would not:
    torch's transformer layers take another way under one.

    Args:
        outputs: The outputs of a forward pass on one sample.
    """
    waiting: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if "BatchNorm" in node.name():
            node.register_prehook(_contiguous)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _contiguous(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if d is None else d.contiguous() for d in cotangents)
