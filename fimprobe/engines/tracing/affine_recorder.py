"""Affine maps inside a decomposed layer, each recorded as a use of its weight and its bias."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.engines.layers.decompositions import NotUnrolled
from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.rules import LINEAR
from fimprobe.engines.tracing.batch_layout import batch_first, has_batch
from fimprobe.engines.tracing.tape import ParameterUse, Tape


@dataclass(frozen=True, kw_only=True)
class _AffineMap:
    """One map x ↦ x Wᵀ + b by the names of its parameters, and the rows it has of packed ones."""

    weight: str
    bias: str | None
    rows: slice | None = None
    bias_rows: slice | None = None

    def parameters(self) -> list[tuple[str, slice | None, str]]:
        """Each parameter's name, its rows, and the name of its rule."""
        weight = (self.weight, self.rows, "weight")
        return [weight] if self.bias is None else [weight, (self.bias, self.bias_rows, "bias")]


class AffineRecorder:
    """Computes and records the affine maps of one call of a decomposed layer.

    The parameters enter the graph detached. Instead, each map adds ε = 0, a tensor that requires a
    gradient: the gradient at ε is the cotangent δ of the map's output, and no parameter gradient of
    the whole batch is computed.
    """

    def __init__(self, tape: Tape, path: str, module: nn.Module) -> None:
        self.tape, self.path, self.module = tape, path, module
        self._pending: list[tuple[int, ParameterUse]] = []

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
        if not has_batch(x, layout, self.tape.batch_size):
            raise NotUnrolled
        out = F.linear(x, self._data(weight, rows), self._data(bias, bias_rows))
        epsilon = torch.zeros_like(out).requires_grad_()
        affine = _AffineMap(weight=weight, bias=bias, rows=rows, bias_rows=bias_rows)
        call = LayerCall(self.module, (batch_first(x.detach(), layout, self.tape.batch_size),))
        self._add_uses(affine, call, epsilon, layout, [x], [self.tape.add_input_edge(x)])
        return out + epsilon

    def steps(self, weight: str, bias: str | None, like: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Prepare one affine map for every time step of ``like`` [T, B, ...].

        All steps are one use: its input is the sequence of states, which fills up step by step.

        Args:
            weight: Name of the weight in the layer.
            bias: Name of the bias; None for no bias.
            like: A sequence with the layer's steps and batch.

        Returns:
            A function of the step t and the state [B, width] that computes the map.
        """
        w, b = self._data(weight, None), self._data(bias, None)
        assert w is not None
        epsilon = like.new_zeros(*like.shape[:2], w.shape[0]).requires_grad_()
        states = like.new_empty(*like.shape[:2], w.shape[1])
        live_states: list[Tensor] = []
        input_edges: list[int | None] = []
        affine = _AffineMap(weight=weight, bias=bias)
        call = LayerCall(self.module, (batch_first(states, 1, self.tape.batch_size),))
        self._add_uses(affine, call, epsilon, 1, live_states, input_edges, per_step=True)
        epsilons = epsilon.unbind(0)

        def step(t: int, state: Tensor) -> Tensor:
            """Compute the map of one time step, and record the state as its input.

            Args:
                t: The step, from 0.
                state: The state before it [B, width].

            Returns:
                x Wᵀ + b [B, out] of the state x.
            """
            with torch.no_grad():
                states[t] = state
            live_states.append(state)
            input_edges.append(self.tape.add_input_edge(state))
            return F.linear(state, w, b) + epsilons[t]

        return step

    def commit(self) -> None:
        """Add the uses to the tape, once the whole layer has been computed."""
        for parameter, use in self._pending:
            self.tape.uses.setdefault(parameter, []).append(use)

    def _add_uses(
        self,
        affine: _AffineMap,
        call: LayerCall,
        epsilon: Tensor,
        layout: int,
        inputs: list[Tensor],
        input_edges: list[int | None],
        *,
        per_step: bool = False,
    ) -> None:
        """Note the uses of a map's weight and bias; ``inputs`` may still fill up."""
        edge = self.tape.add_output_edge(epsilon, layout)
        for name, rows, rule in affine.parameters():
            if not self._parameter(name).requires_grad:
                continue

            def output_tangent(
                u: Tensor, rows: slice | None = rows, is_weight: bool = rule == "weight"
            ) -> Tensor:
                """The derivative of the map's output along a direction, of the shape of the output.

                Args:
                    u: The direction, of the shape of the whole parameter.
                    rows: The rows that the map has of a packed parameter; None for all.
                    is_weight: Whether the parameter is the weight; otherwise it is the bias.
                """
                u = u if rows is None else u[rows]
                if not is_weight:
                    return u.expand(epsilon.shape)
                tangents = [F.linear(x, u) for x in inputs]
                return torch.stack(tangents) if per_step else tangents[0]

            use = ParameterUse(
                rule=LINEAR[rule],
                call=call,
                edge=edge,
                layout=layout,
                rows=rows,
                input_edges=input_edges,
                output_tangent=output_tangent,
                per_step=per_step,
            )
            self._pending.append((id(self._parameter(name)), use))

    def _data(self, name: str | None, rows: slice | None) -> Any:
        if name is None:
            return None
        data = self._parameter(name).detach()
        return data if rows is None else data[rows]

    def _parameter(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self.module)
