"""A model's inputs as one object that can be cut along the batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fimprobe.errors import BatchError


@dataclass(frozen=True)
class Batch:
    """Positional and keyword inputs of a forward pass, and the number of samples in them.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        size: Number of samples B.
        batched: Indices of the tensors [B, ...] among the leaves of ``(args, kwargs)``. They are cut
            along their first dimension; anything else belongs to all samples and is passed whole.
        origin: The batch from which these samples were selected; None for a batch as it came.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    batched: frozenset[int] = frozenset()
    origin: Batch | None = field(default=None, compare=False, repr=False)

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

        Every tensor as long as the first one is assumed to hold the samples, until
        :mod:`fimprobe.model.input_roles` shows that all samples share it.

        Args:
            args: Positional arguments; tensors have the shape [B, ...].
            kwargs: Keyword arguments; tensors have the shape [B, ...].

        Returns:
            The batch; its size B is the first dimension of the first tensor that has one.

        Raises:
            BatchError: If no tensor has a batch dimension, or if B is 0.
        """
        leaves = tree_leaves((args, kwargs))
        lengths = {
            i: x.shape[0] for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() > 0
        }
        if not lengths:
            raise BatchError(
                "inputs hold no tensor with a batch dimension; pass the tensors themselves (a "
                "tensor, tuple or mapping), batch first"
            )
        first = min(lengths)
        size = lengths[first]
        if size == 0:
            raise BatchError(f"inputs are an empty batch, shape {tuple(leaves[first].shape)}")
        args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        return cls(args, kwargs, size, frozenset(i for i, n in lengths.items() if n == size))

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The samples at ``rows``."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for i in self.batched:
            x = leaves[i]
            leaves[i] = x[rows.to(x.device) if isinstance(rows, Tensor) else rows]
        args, kwargs = tree_unflatten(leaves, structure)
        size = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        return Batch(args, kwargs, size, self.batched, self.origin or self)

    def with_shared(self, indices: Collection[int]) -> Batch:
        """Return the batch with some tensors as they came, because all samples share them.

        Args:
            indices: Indices of these tensors among the leaves of ``(args, kwargs)``.
        """
        shared = self.batched & set(indices)
        if not shared:
            return self
        origin = None if self.origin is None else self.origin.with_shared(shared)
        leaves, structure = tree_flatten((self.args, self.kwargs))
        if origin is not None:
            uncut = tree_leaves((origin.args, origin.kwargs))
            for i in shared:
                leaves[i] = uncut[i].to(leaves[i].dtype)
        args, kwargs = tree_unflatten(leaves, structure)
        return Batch(args, kwargs, self.size, self.batched - shared, origin)

    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def to(self, dtype: torch.dtype) -> Batch:
        """Half-precision tensors raised to ``dtype`` (autocast feeds them to float32 models)."""
        half = (torch.float16, torch.bfloat16)

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.dtype in half else x

        args, kwargs = tree_map(cast, (self.args, self.kwargs))
        return Batch(args, kwargs, self.size, self.batched, self.origin)
