"""A model's inputs as one object that can be cut along the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

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
        leaves, structure = flatten_arguments(args, kwargs)
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
        detached = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = unflatten_arguments(detached, structure)
        return cls(args, kwargs, size, {i: 0 for i, n in lengths.items() if n == size})

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The samples at ``rows``."""
        leaves, structure = flatten_arguments(self.args, self.kwargs)
        for i, layout in self.batched.items():
            x = batch_first(leaves[i], layout, self.size)
            x = x[rows.to(x.device) if isinstance(rows, Tensor) else rows]
            leaves[i] = from_batch_first(x, layout)
        args, kwargs = unflatten_arguments(leaves, structure)
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
        leaves, structure = flatten_arguments(self.args, self.kwargs)
        if origin is not None:
            uncut = origin.leaves()
            for i in shared:
                leaves[i] = uncut[i].to(leaves[i].dtype)
        args, kwargs = unflatten_arguments(leaves, structure)
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
        leaves, structure = flatten_arguments(self.args, self.kwargs)
        if origin is not None and self.rows is not None:
            uncut = origin.leaves()
            for i in folded:
                x = batch_first(uncut[i], "folded", origin.size)[self.rows.to(uncut[i].device)]
                leaves[i] = from_batch_first(x, "folded").to(leaves[i].dtype)
        args, kwargs = unflatten_arguments(leaves, structure)
        return Batch(args, kwargs, self.size, {**self.batched, **folded}, origin, self.rows)

    def leaves(self) -> list[Any]:
        """All tensors, numbers and other objects among the inputs, in a fixed order."""
        return flatten_arguments(self.args, self.kwargs)[0]

    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return [x for x in self.leaves() if isinstance(x, Tensor)]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
        """Return positional and keyword inputs with another tensor in place of each.

        Args:
            function: From a tensor to the other one.
        """
        leaves, structure = flatten_arguments(self.args, self.kwargs)
        mapped = [function(x) if isinstance(x, Tensor) else x for x in leaves]
        return unflatten_arguments(mapped, structure)

    def to(self, dtype: torch.dtype) -> Batch:
        """Half-precision tensors raised to ``dtype`` (autocast feeds them to float32 models)."""
        half = (torch.float16, torch.bfloat16)

        args, kwargs = self.map_tensors(lambda x: x.to(dtype) if x.dtype in half else x)
        return Batch(args, kwargs, self.size, self.batched, self.origin, self.rows)


def flatten_arguments(args: tuple[Any, ...], kwargs: Any) -> tuple[list[Any], TreeSpec | None]:
    """Return the leaves of a call's arguments, and their structure.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        As ``tree_flatten((args, kwargs))``. None stands for the structure of tensors that are all
        positional: most calls have such arguments, and need no search.
    """
    if not kwargs and all(type(x) is Tensor for x in args):
        return list(args), None
    return tree_flatten((args, kwargs))


def unflatten_arguments(leaves: Sequence[Any], structure: TreeSpec | None) -> tuple[Any, Any]:
    """Invert :func:`flatten_arguments`.

    Args:
        leaves: The leaves, which may be others than before.
        structure: Their structure.

    Returns:
        Positional and keyword arguments.
    """
    if structure is None:
        return tuple(leaves), {}
    args, kwargs = tree_unflatten(leaves, structure)
    return args, kwargs
