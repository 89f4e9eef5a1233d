"""A model's inputs as one object that can be cut along the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fimprobe.errors import BatchError


@dataclass(frozen=True)
class Batch:
    """Positional and keyword inputs of a forward pass, and the number of samples in them.

    Tensors whose first dimension is ``size`` are cut along it; anything else is passed whole.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int

    @classmethod
    def of(cls, inputs: Any) -> Batch:
        """Return a batch from the inputs of ``measure``: a tensor, a tuple or list, or a mapping."""
        if isinstance(inputs, Batch):
            return inputs
        if isinstance(inputs, Mapping):
            return cls.of_call((), dict(inputs))
        if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
            return cls.of_call(tuple(inputs), {})
        return cls.of_call((inputs,), {})

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """Return a batch from the arguments of a forward call; tensors are detached.

        Args:
            args: Positional arguments; tensors have the shape [B, ...].
            kwargs: Keyword arguments; tensors have the shape [B, ...].

        Returns:
            The batch; its size B is the first dimension of the first tensor that has one.

        Raises:
            BatchError: If no tensor has a batch dimension, or if B is 0.
        """
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        if not leaves:
            raise BatchError(
                "inputs hold no tensor with a batch dimension; pass the tensors themselves (a "
                "tensor, tuple or mapping), batch first"
            )
        if leaves[0].shape[0] == 0:
            raise BatchError(f"inputs are an empty batch, shape {tuple(leaves[0].shape)}")
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        return cls(args, kwargs, leaves[0].shape[0])

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The samples at ``rows``."""

        def cut(x: Any) -> Any:
            if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == self.size:
                return x[rows.to(x.device) if isinstance(rows, Tensor) else rows]
            return x

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        size = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        return Batch(args, kwargs, size)

    def to(self, dtype: torch.dtype) -> Batch:
        """Half-precision tensors raised to ``dtype`` (autocast feeds them to float32 models)."""
        half = (torch.float16, torch.bfloat16)

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.dtype in half else x

        args, kwargs = tree_map(cast, (self.args, self.kwargs))
        return Batch(args, kwargs, self.size)
