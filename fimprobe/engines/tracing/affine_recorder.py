"""Affine maps inside a decomposed layer, each recorded as a use of its weight and its bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.engines.layers.affine_maps import AffineMap, AffineMaps
from fimprobe.engines.layers.decompositions import NotUnrolled
from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.rules import LINEAR
from fimprobe.engines.tracing.tape import ParameterUse, Tape
from fimprobe.model.sample_dimension import batch_first, has_batch


class AffineRecorder(AffineMaps):
    """Computes the affine maps, and records each as a use of its parameters.

    The parameters enter the graph detached. Instead, each map adds ε = 0, a tensor that requires a
    gradient: the gradient at ε is the cotangent δ of the map's output, and no parameter gradient of
    the whole batch is computed.
    """

    def __init__(self, tape: Tape, module: nn.Module) -> None:
        super().__init__(module)
        self.tape = tape
        self._pending: list[tuple[int, ParameterUse]] = []

    def compute(self, affine: AffineMap, x: Tensor, layout: int) -> Tensor:
        """Compute one map x Wᵀ + b, and record it."""
        if not has_batch(x, layout, self.tape.batch_size):
            raise NotUnrolled
        weight = self._data(affine.weight, affine.rows)
        out = F.linear(x, weight, self._data(affine.bias, affine.bias_rows))
        epsilon = torch.zeros_like(out).requires_grad_()
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
        affine = AffineMap(weight=weight, bias=bias)
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
        affine: AffineMap,
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
            if not self.parameter(name).requires_grad:
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
            self._pending.append((id(self.parameter(name)), use))

    def _data(self, name: str | None, rows: slice | None) -> Any:
        if name is None:
            return None
        data = self.parameter(name).detach()
        return data if rows is None else data[rows]
