"""Shifts inside decomposed attention and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.engines.layers.affine_maps import AffineMap, AffineMaps
from fimprobe.engines.layers.decompositions import NotUnrolled
from fimprobe.engines.layers.rules import LINEAR
from fimprobe.engines.spot_checks.shifted_calls import EntryGroup, Steps, add_shift
from fimprobe.model.sample_dimension import batch_first, has_batch


class ShiftedAffine(AffineMaps):
    """The affine maps of one call of a decomposed layer, with shifts."""

    def __init__(
        self, module: nn.Module, size: int, groups: Mapping[int, EntryGroup], steps: Steps | None
    ) -> None:
        super().__init__(module)
        self.size, self.groups, self.shifts = size, groups, steps

    def compute(self, affine: AffineMap, x: Tensor, layout: int) -> Tensor:
        """Compute one map x Wᵀ + b with the shifts of its rows."""
        if not has_batch(x, layout, self.size):
            raise NotUnrolled
        w, b = self._weight_and_bias(affine.weight, affine.bias)
        out = F.linear(
            x, _rows_of(w, affine.rows), None if b is None else _rows_of(b, affine.bias_rows)
        )
        at_rows = batch_first(out, layout, self.size)
        self._shift(at_rows, batch_first(x, layout, self.size), w, "weight", affine.rows)
        if b is not None:
            self._shift(at_rows, batch_first(x, layout, self.size), b, "bias", affine.bias_rows)
        return out

    def steps(self, weight: str, bias: str | None, like: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The same map for one time step after the other, as a function of the step and the state."""
        w, b = self._weight_and_bias(weight, bias)

        def step(t: int, state: Tensor) -> Tensor:
            """Compute x Wᵀ + b [n, out] of the state x [n, width]; the step is not read."""
            out = F.linear(state, w, b)
            self._shift(out, state, w, "weight", None)
            if b is not None:
                self._shift(out, state, b, "bias", None)
            return out

        return step

    def _shift(
        self, out: Tensor, x: Tensor, parameter: Tensor, role: str, rows: slice | None
    ) -> None:
        group = self.groups.get(id(parameter))
        if group is not None and self.shifts is not None:
            add_shift(out, x, LINEAR[role], group.slice(rows), self.shifts)

    def _weight_and_bias(self, weight: str, bias: str | None) -> tuple[Tensor, Tensor | None]:
        return self.parameter(weight), None if bias is None else self.parameter(bias)


def _rows_of(x: Tensor, rows: slice | None) -> Tensor:
    return x if rows is None else x[rows]
