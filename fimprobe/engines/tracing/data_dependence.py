"""Operations of a forward pass through which shapes may depend on values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class DataDependence(TorchDispatchMode):
    """Notes operations through which shapes may depend on values.

    Attributes:
        reads_values: Whether a number was read from a tensor (``item``, ``tolist``, ``if``).
        has_ragged_shapes: Whether an output's shape depends on values.
    """

    _RAGGED = frozenset(
        ("nonzero", "nonzero_numpy", "masked_select", "bincount", "_pack_padded_sequence")
        + ("sort", "argsort", "msort", "topk")  # samples may be put into another order
        + ("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive")
    )

    def __init__(self) -> None:
        super().__init__()
        self.reads_values = self.has_ragged_shapes = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not let torch wrap the mode for its compiler, which would import TorchDynamo."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and args[0].dtype != torch.bool:
            self.reads_values = True  # a length; a flag selects a way, the same for all samples
        by_mask = name == "index" and _has_mask(args[1])
        by_counts = name == "repeat_interleave" and isinstance(args[-1], Tensor)
        if name in self._RAGGED or by_mask or by_counts:
            self.has_ragged_shapes = True
        return func(*args, **(kwargs or {}))


class ValueReads(TorchFunctionMode):
    """Notes in ``noted`` that numbers were read from a tensor in ways that dispatch no operation."""

    _READS = frozenset(
        [Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__array__]
    )

    def __init__(self, noted: DataDependence) -> None:
        super().__init__()
        self._noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        if func in self._READS and args[0].dtype != torch.bool:
            self._noted.reads_values = True
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(x, Tensor) and x.dtype in masks for x in indices)
