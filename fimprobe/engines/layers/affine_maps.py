"""Affine maps x ↦ x Wᵀ + b, of which the decompositions of layers consist."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AffineMap:
    """One map by the names of its parameters, and the rows that it has of packed ones.

    Attributes:
        weight: Name of the weight in the layer.
        bias: Name of the bias; None for no bias.
        rows: The rows that the map has of a packed weight; None for all.
        bias_rows: The rows that it has of a packed bias; None for all.
    """

    weight: str
    bias: str | None
    rows: slice | None = None
    bias_rows: slice | None = None

    def parameters(self) -> list[tuple[str, slice | None, str]]:
        """Each parameter's name, its rows, and the name of its rule."""
        weight = (self.weight, self.rows, "weight")
        return [weight] if self.bias is None else [weight, (self.bias, self.bias_rows, "bias")]


class AffineMaps(ABC):
    """Computes the affine maps of one call of a decomposed layer.

    Args:
        module: The layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(
        self,
        x: Tensor,
        weight: str,
        bias: str | None,
        rows: slice | None = None,
        bias_rows: slice | None = None,
        *,
        layout: int | None = None,
    ) -> Tensor:
        """Compute x Wᵀ + b.

        Args:
            x: The input.
            weight: Name of the weight in the layer.
            bias: Name of the bias; None for no bias.
            rows: The rows that the map has of a packed weight.
            bias_rows: The rows that it has of a packed bias.
            layout: The batch dimension of ``x``; None for the layer's own setting.

        Raises:
            NotUnrolled: If ``x`` does not hold the batch there.
        """
        if layout is None:
            layout = 0 if self.module.batch_first else 1
        affine = AffineMap(weight=weight, bias=bias, rows=rows, bias_rows=bias_rows)
        return self.compute(affine, x, layout)

    @abstractmethod
    def compute(self, affine: AffineMap, x: Tensor, layout: int) -> Tensor:
        """Compute one map.

        Args:
            affine: The map.
            x: The input.
            layout: The batch dimension of ``x``.

        Raises:
            NotUnrolled: If ``x`` does not hold the batch there.
        """

    @abstractmethod
    def steps(self, weight: str, bias: str | None, like: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Prepare one affine map for every time step of ``like`` [T, B, ...].

        Args:
            weight: Name of the weight in the layer.
            bias: Name of the bias; None for no bias.
            like: A sequence with the layer's steps and batch.

        Returns:
            A function of the step t and the state [B, width] that computes the map.
        """

    def parameter(self, name: str) -> Tensor:
        """Return the layer's parameter of a name; of its submodules too, with dots."""
        parameter: Tensor = functools.reduce(getattr, name.split("."), self.module)
        return parameter
