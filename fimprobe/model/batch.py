"""A model's inputs as one object that can be cut along the batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fimprobe.errors import BatchError
from fimprobe.model.sample_dimension import Layout, batch_first, from_batch_first


@dataclass(frozen=True)
class Batch:
    """Positional and keyword inputs of a forward pass, and the number of samples in them.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        size: Number of samples B.
        batched: The layout of each tensor that holds the samples, by its index among the leaves of
            ``(args, kwargs)``. Anything else belongs to all samples and is passed whole.
        origin: The batch from which these samples were selected; None for a batch as it came.
        rows: Their places in it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    batched: Mapping[int, Layout] = field(default_factory=dict)
    origin: Batch | None = field(default=None, compare=False, repr=False)
    rows: Tensor | None = field(default=None, compare=False, repr=False)

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
        return cls(args, kwargs, size, {i: 0 for i, n in lengths.items() if n == size})

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The samples at ``rows``."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for i, layout in self.batched.items():
            x = batch_first(leaves[i], layout, self.size)
            x = x[rows.to(x.device) if isinstance(rows, Tensor) else rows]
            leaves[i] = from_batch_first(x, layout)
        args, kwargs = tree_unflatten(leaves, structure)
        places = torch.arange(self.size) if self.rows is None else self.rows
        places = places[rows.cpu() if isinstance(rows, Tensor) else rows]
        return Batch(args, kwargs, len(places), self.batched, self.origin or self, places)

    def with_shared(self, indices: Collection[int]) -> Batch:
        """Return the batch with some tensors as they came, because all samples share them.

        Args:
            indices: Indices of these tensors among the leaves of ``(args, kwargs)``.
        """
        shared = set(self.batched) & set(indices)
        if not shared:
            return self
        origin = None if self.origin is None else self.origin.with_shared(shared)
        leaves, structure = tree_flatten((self.args, self.kwargs))
        if origin is not None:
            uncut = tree_leaves((origin.args, origin.kwargs))
            for i in shared:
                leaves[i] = uncut[i].to(leaves[i].dtype)
        args, kwargs = tree_unflatten(leaves, structure)
        batched = {i: layout for i, layout in self.batched.items() if i not in shared}
        return Batch(args, kwargs, self.size, batched, origin, self.rows)

    def with_folded(self, indices: Collection[int]) -> Batch:
        """Return the batch with some tensors cut as [B·k, ...], k rows for each sample.

        Args:
            indices: Indices of these tensors among the leaves of ``(args, kwargs)``.
        """
        folded = dict.fromkeys(sorted(set(indices) - set(self.batched)), "folded")
        if not folded:
            return self
        origin = None if self.origin is None else self.origin.with_folded(folded)
        leaves, structure = tree_flatten((self.args, self.kwargs))
        if origin is not None and self.rows is not None:
            uncut = tree_leaves((origin.args, origin.kwargs))
            for i in folded:
                x = batch_first(uncut[i], "folded", origin.size)[self.rows.to(uncut[i].device)]
                leaves[i] = from_batch_first(x, "folded").to(leaves[i].dtype)
        args, kwargs = tree_unflatten(leaves, structure)
        return Batch(args, kwargs, self.size, {**self.batched, **folded}, origin, self.rows)

    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def to(self, dtype: torch.dtype) -> Batch:
        """Half-precision tensors raised to ``dtype`` (autocast feeds them to float32 models)."""
        half = (torch.float16, torch.bfloat16)

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.dtype in half else x

        args, kwargs = tree_map(cast, (self.args, self.kwargs))
        return Batch(args, kwargs, self.size, self.batched, self.origin, self.rows)
