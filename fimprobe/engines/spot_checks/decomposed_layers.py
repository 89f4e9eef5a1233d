"""Shifts inside decomposed attention and recurrent layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.engines.layers.decompositions import NotUnrolled
from fimprobe.engines.layers.rules import LINEAR
from fimprobe.engines.spot_checks.shifted_calls import EntryGroup, Steps, add_shift
from fimprobe.engines.tracing.batch_layout import batch_first, has_batch


class ShiftedAffine:
    """The affine maps of one call of a decomposed layer, with shifts.

    It is called as :class:`fimprobe.engines.tracing.affine_recorder.AffineRecorder` is.
    """

    def __init__(
        self, module: nn.Module, size: int, groups: Mapping[int, EntryGroup], steps: Steps | None
    ) -> None:
        self.module, self.size, self.groups, self.shifts = module, size, groups, steps

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
        """Compute x Wᵀ + b with the shifts of its rows.

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
        if not has_batch(x, layout, self.size):
            raise NotUnrolled
        w, b = self._parameter(weight), None if bias is None else self._parameter(bias)
        out = F.linear(x, _rows_of(w, rows), None if b is None else _rows_of(b, bias_rows))
        at_rows = batch_first(out, layout, self.size)
        self._shift(at_rows, batch_first(x, layout, self.size), w, "weight", rows)
        if b is not None:
            self._shift(at_rows, batch_first(x, layout, self.size), b, "bias", bias_rows)
        return out

    def steps(self, weight: str, bias: str | None, like: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The same map for one time step after the other, as a function of the step and the state."""
        w, b = self._parameter(weight), None if bias is None else self._parameter(bias)

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

    def _parameter(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self.module)


def _rows_of(x: Tensor, rows: slice | None) -> Tensor:
    return x if rows is None else x[rows]
