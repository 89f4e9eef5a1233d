"""Cotangents with their graph, and their tangents along directions: Hessian-vector products.

Symbols: c a vector at the outputs h, φ = cᵀh, z the output of a recorded call, δ = ∂φ/∂z its
cotangent, x the input of a call, δ_x = ∂φ/∂x. A dot denotes the derivative along a direction.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.tracing.tape import Tape
from fimprobe.model.process_wide import ProcessWide

OptionalTensors = list[Tensor | None]


_MATH_ATTENTION = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))


def use_differentiable_attention() -> AbstractContextManager[None]:
    """Select the attention kernel that has a second derivative; flash attention has none."""
    return _MATH_ATTENTION.changed()


class PulledBackVector(NamedTuple):
    """One vector at the outputs, and its cotangents.

    Attributes:
        output: The vector [B, ...].
        edges: δ at each output edge, detached; None where the output does not depend on the edge.
    """

    output: Tensor
    edges: OptionalTensors


class EdgeTangents(NamedTuple):
    """The derivatives along one direction.

    Attributes:
        cotangents: δ̇ at each output edge; None where it is zero.
        inputs: ẋ at each input edge; None where it is zero.
    """

    cotangents: OptionalTensors
    inputs: OptionalTensors


class DoubleBackward:
    """The first backward pass over one chunk, with its graph, and second passes along directions.

    Attributes:
        outputs: The outputs h [B, ...].
        tape: The recorded forward pass.
        fallback_parameters: Parameters of fallback calls, by name. Their gradients are computed by
            the first pass as well: a direction may move them.
    """

    def __init__(self, outputs: Tensor, tape: Tape, fallback_parameters: dict[str, Tensor]) -> None:
        self.outputs, self.tape = outputs, tape
        self.fallback_parameters = fallback_parameters
        self._points = [*tape.output_edges, *tape.input_edges, *fallback_parameters.values()]
        self._vectors: list[Tensor] = []
        self._first_order: list[OptionalTensors] = []
        self._num_outputs, self._num_inputs = len(tape.output_edges), len(tape.input_edges)

    def pull_back(self, vectors: list[Tensor]) -> None:
        """Pull vectors at the outputs back to all edges, and keep the graph of the results."""
        for vector in vectors:
            gradients: OptionalTensors = []
            if self._points:
                gradients = list(vjp([self.outputs], [vector], self._points, create_graph=True))
            self._vectors.append(vector)
            self._first_order.append(gradients)

    def edge_cotangents(self, vectors: slice) -> list[OptionalTensors]:
        """Gradients at all output and input edges, detached, for some of the vectors."""
        count = self._num_outputs + self._num_inputs
        return [
            [None if d is None else d.detach() for d in gradients[:count]]
            for gradients in self._first_order[vectors]
        ]

    def pulled_back(self, index: int) -> PulledBackVector:
        """One vector with its cotangents at the output edges, detached."""
        gradients = self._first_order[index][: self._num_outputs]
        edges = [None if d is None else d.detach() for d in gradients]
        return PulledBackVector(self._vectors[index], edges)

    def all_edge_tangents(
        self,
        directions: OptionalTensors,
        parameter_directions: OptionalTensors | None = None,
        *,
        inputs: bool = True,
        piecewise_linear: bool = False,
    ) -> list[EdgeTangents]:
        """The tangents of every vector; they share ẋ, since the outputs' vectors move no input."""
        if inputs and self._vectors_reach_the_same():
            first = self.edge_tangents(
                0, directions, parameter_directions, piecewise_linear=piecewise_linear
            )
            others = [
                self.edge_tangents(
                    y,
                    directions,
                    parameter_directions,
                    inputs=False,
                    piecewise_linear=piecewise_linear,
                )
                for y in range(1, len(self._vectors))
            ]
            return [first, *(EdgeTangents(t.cotangents, first.inputs) for t in others)]
        return [
            self.edge_tangents(
                y, directions, parameter_directions, inputs=inputs, piecewise_linear=piecewise_linear
            )
            for y in range(len(self._vectors))
        ]

    def _vectors_reach_the_same(self) -> bool:
        """Whether the gradients of all vectors depend on one another at the same edges."""
        reached = [
            tuple(g is not None and g.requires_grad for g in gradients)
            for gradients in self._first_order
        ]
        return len(set(reached)) == 1

    def edge_tangents(
        self,
        index: int,
        directions: OptionalTensors,
        parameter_directions: OptionalTensors | None = None,
        *,
        inputs: bool = True,
        piecewise_linear: bool = False,
    ) -> EdgeTangents:
        """Differentiate one vector's cotangents along a direction of the calls' outputs, held fixed.

        Let s = ⟨ż, δ⟩ with ż constant. By symmetry of second derivatives δ̇ = ∂s/∂z. The first pass
        computed δ = (∂x/∂z)ᵀ δ_x from the cotangents of later inputs x, linear in them, so that
        ∂s/∂δ_x = (∂x/∂z) ż = ẋ. One backward pass through the graph of δ gives both.

        Args:
            index: Number of the vector.
            directions: ż at each output edge; None for zero.
            parameter_directions: How each fallback parameter moves; None if none does.
            inputs: Whether ẋ is needed.
            piecewise_linear: Whether δ̇ is known to be zero.
        """
        gradients = self._first_order[index]
        all_directions = [*directions, *[None] * self._num_inputs, *(parameter_directions or [])]
        pairs = [
            (d, v)
            for v, d in zip(all_directions, gradients, strict=False)
            if v is not None and d is not None and d.requires_grad
        ]
        at_inputs = gradients[self._num_outputs : self._num_outputs + self._num_inputs]
        live_inputs = [g for g in at_inputs if g is not None and g.requires_grad] if inputs else []
        output_edges = [] if piecewise_linear else self.tape.output_edges
        no_inputs: OptionalTensors = [None] * self._num_inputs
        if not pairs or not (output_edges or live_inputs):
            return EdgeTangents([None] * self._num_outputs, no_inputs)
        tangents = list(
            vjp([d for d, _ in pairs], [v for _, v in pairs], [*output_edges, *live_inputs])
        )
        if piecewise_linear:
            tangents = [*[None] * self._num_outputs, *tangents]
        if not inputs:
            return EdgeTangents(tangents, no_inputs)
        remaining = iter(tangents[self._num_outputs :])
        input_tangents = [
            next(remaining) if g is not None and g.requires_grad else None for g in at_inputs
        ]
        return EdgeTangents(tangents[: self._num_outputs], input_tangents)

    def with_input_dependence(
        self, index: int, tangents: EdgeTangents, directions: OptionalTensors
    ) -> EdgeTangents:
        """Add to δ̇ what follows from a direction that depends on the calls' inputs.

        A direction u of the parameters moves z by ż(x; u), and x depends on earlier calls. Holding
        ż fixed leaves out ∂⟨ż(x; u), δ⟩/∂z with δ fixed, which is a first-order backward pass.

        Args:
            index: Number of the vector.
            tangents: The result of :meth:`edge_tangents` for the directions held fixed.
            directions: ż at each output edge with its graph; None for zero.
        """
        pairs = [
            (v, d.detach())
            for v, d in zip(directions, self._first_order[index], strict=False)
            if v is not None and v.requires_grad and d is not None
        ]
        if not pairs:
            return tangents
        more = vjp([v for v, _ in pairs], [d for _, d in pairs], self.tape.output_edges)
        sums: OptionalTensors = [
            b if a is None else (a if b is None else a + b)
            for a, b in zip(tangents.cotangents, more, strict=True)
        ]
        return EdgeTangents(sums, tangents.inputs)
