"""Per-sample gradients and their tangents from calls that are re-evaluated on single samples.

Symbols as in :mod:`fimprobe.engines.curvature.parameter_derivatives`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.curvature.directions import ParameterDirection
from fimprobe.engines.curvature.double_backward import EdgeTangents, PulledBackVector
from fimprobe.engines.curvature.shared_evaluations import SharedEvaluations
from fimprobe.engines.layers.module_tangents import CallDirection, per_sample_vjp_tangent
from fimprobe.engines.layers.per_sample import per_sample_vjp
from fimprobe.engines.moments.contraction import at_least_float32
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.tape import FallbackCall
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import Layout, batch_first

OptionalTensors = Sequence[Tensor | None]

LocalCall = tuple[FallbackCall, str]
"""A call, and the name of a parameter inside its module."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """The quantities that move along a direction, apart from the cotangents δ.

    Attributes:
        inputs: Factor of the calls' input tangents ẋ; 0 if the inputs are fixed.
        assigned_parameters: Whether the parameters move that a fallback call provides.
        all_parameters: Whether all parameters inside a fallback call move.
        flipped: Whether they move along σu instead of u.
    """

    inputs: float = 0.0
    assigned_parameters: bool = False
    all_parameters: bool = False
    flipped: bool = False


COTANGENTS_ONLY = Motion()
TWICE_THE_INPUTS = Motion(inputs=2.0)
WITHIN_CALL = Motion(assigned_parameters=True)
WITHIN_CALL_FLIPPED = Motion(assigned_parameters=True, flipped=True)
EVERYTHING = Motion(inputs=1.0, all_parameters=True)
EVERYTHING_FLIPPED = Motion(inputs=1.0, all_parameters=True, flipped=True)


@dataclass(frozen=True, kw_only=True)
class FallbackDerivatives:
    """Derivatives of fallback calls of one chunk.

    Attributes:
        chunk: The recorded forward pass.
        direction: The direction in which parameters move; None if they do not.
        shared: Evaluations that all parameters of a call share; None to evaluate for one alone.
    """

    chunk: Chunk
    direction: ParameterDirection | None = None
    shared: SharedEvaluations | None = None

    def gradients(
        self, local_call: LocalCall, cotangents: Sequence[OptionalTensors], samples: slice
    ) -> Tensor | None:
        """Pull cotangents at the outputs of one call back to the parameter.

        Args:
            local_call: The call, and the parameter's name inside its module.
            cotangents: For each of n vectors, the cotangents by output edge.
            samples: The b samples.

        Returns:
            [b, n, *shape]; None if no vector reaches the call.
        """
        call, local_name = local_call
        if call.path == "":  # the whole model has no edges
            return None
        at_call: list[Tensor | None] = []
        for edge in call.output_edges:
            filled = fill(
                [self._rows(edges, edge, call.output_layout, samples) for edges in cotangents]
            )
            at_call.append(None if filled is None else torch.stack(filled, 1))
        if all(d is None for d in at_call):
            return None

        def evaluate(names: list[str], batch: Batch, vectorize: bool) -> dict[str, Tensor]:
            """Gradients [b, n, *shape] by local name, of a batch of b samples.

            Args:
                names: The parameters' names inside the module.
                batch: The call's arguments for the b samples.
                vectorize: Whether to use ``vmap``.
            """
            return per_sample_vjp(
                call.module,
                _parameters(call, names),
                batch,
                at_call,
                output_layout=call.output_layout,
                vectorize=vectorize,
            )

        return at_least_float32(self._evaluate(local_call, evaluate, samples, (cotangents,)))

    def tangents(
        self,
        local_call: LocalCall,
        tangents: EdgeTangents,
        vector: PulledBackVector,
        samples: slice,
        motion: Motion,
    ) -> Tensor | None:
        """Differentiate the gradient that one call provides along a direction.

        The whole model has no edges: its cotangent is the vector itself, which does not move.

        Args:
            local_call: The call, and the parameter's name inside its module.
            tangents: δ̇ and ẋ for the direction.
            vector: The vector that is pulled back, with its cotangents δ.
            samples: The b samples.
            motion: What moves, apart from δ.

        Returns:
            [b, 1, *shape]; None for zero.
        """
        call, local_name = local_call
        direction = self._call_direction(call, tangents, samples, motion)
        if call.path == "":
            cotangents: list[Tensor | None] = [vector.output[samples]]
        else:
            # where only δ̇ reaches an output, its δ is zero
            cotangents = [
                torch.zeros_like(t) if d is None and t is not None else d
                for d, t in zip(
                    (
                        self._rows(vector.edges, e, call.output_layout, samples)
                        for e in call.output_edges
                    ),
                    direction.cotangents,
                    strict=True,
                )
            ]
            if all(d is None for d in cotangents):
                return None
        moving = [*direction.cotangents, *direction.inputs]
        if not direction.parameters and all(x is None for x in moving):
            return None
        problem = self.chunk.problem
        select: Any = (lambda out: [problem.select_outputs(out)]) if call.path == "" else None

        def evaluate(names: list[str], batch: Batch, vectorize: bool) -> dict[str, Tensor]:
            """Tangents [b, *shape] by local name, of a batch of b samples.

            Args:
                names: The parameters' names inside the module.
                batch: The call's arguments for the b samples.
                vectorize: Whether to use ``vmap``.
            """
            return per_sample_vjp_tangent(
                call.module,
                _parameters(call, names),
                batch,
                cotangents,
                direction,
                select=select,
                output_layout=call.output_layout,
                vectorize=vectorize,
            )

        question = (tangents, vector, self.direction, motion)
        return at_least_float32(self._evaluate(local_call, evaluate, samples, question)).unsqueeze(1)

    def _call_direction(
        self, call: FallbackCall, tangents: EdgeTangents, samples: slice, motion: Motion
    ) -> CallDirection:
        """How the parameters, inputs and output cotangents of a fallback call move."""
        values: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        if self.direction is not None and (motion.assigned_parameters or motion.all_parameters):
            for local_name, parameter in call.module.named_parameters():
                name = self.chunk.parameter_names.get(id(parameter))
                if name is None or name not in self.direction.values:
                    continue
                if not (motion.all_parameters or self._is_assigned(call, name)):
                    continue
                values[local_name] = self.direction.values[name]
                if motion.flipped:
                    scales[local_name] = self.direction.flips[name][samples]
        if call.path == "":
            return CallDirection(parameters=values, scales=scales, cotangents=[None])
        steps: list[Tensor | None] = [
            self._rows(tangents.inputs, i, layout, samples) if motion.inputs else None
            for i, layout in zip(call.input_edges, call.input_layouts, strict=True)
        ]
        return CallDirection(
            parameters=values,
            scales=scales,
            inputs=[None if x is None else motion.inputs * x for x in steps],
            cotangents=[
                self._rows(tangents.cotangents, e, call.output_layout, samples)
                for e in call.output_edges
            ],
        )

    def _rows(
        self, tensors: OptionalTensors, index: int | None, layout: Layout | None, samples: slice
    ) -> Tensor | None:
        """Some samples of the indexed tensor, batch first; all of it where it holds no batch."""
        x = None if index is None else tensors[index]
        if x is None or layout is None:
            return x
        return batch_first(x, layout, self.chunk.size)[samples]

    def _is_assigned(self, call: FallbackCall, name: str) -> bool:
        """Whether the call, if it contains the named parameter, provides its gradient."""
        planned = self.chunk.plan.fallbacks.get(name)
        return planned == call.path if planned is not None else True

    def _evaluate(
        self,
        local_call: LocalCall,
        evaluate: Callable[[list[str], Batch, bool], dict[str, Tensor]],
        samples: slice,
        question: tuple[Any, ...],
    ) -> Tensor:
        """Evaluate a call for one parameter, or hand out what was evaluated for several.

        Args:
            local_call: The call, and the parameter's name inside its module.
            evaluate: Maps names, a batch and whether to use ``vmap`` to results by name.
            samples: The samples.
            question: The objects that determine the result.
        """
        call, local_name = local_call

        def evaluate_names(names: list[str]) -> dict[str, Tensor]:
            return self._evaluate_samples(call, functools.partial(evaluate, names), samples)

        if self.shared is None:
            return evaluate_names([local_name])[local_name]
        return self.shared.get(call, local_name, samples, question, evaluate_names)

    def _evaluate_samples(
        self,
        call: FallbackCall,
        evaluate: Callable[[Batch, bool], dict[str, Tensor]],
        samples: slice,
    ) -> dict[str, Tensor]:
        """Evaluate a call on some samples, with ``vmap`` if the module allows it."""
        batch = call.inputs[samples]
        unvectorized = self.chunk.plan.unvectorized
        for vectorize in (True, False) if call.path not in unvectorized else (False,):
            try:
                return evaluate(batch, vectorize)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if not vectorize:
                    raise
                unvectorized.add(call.path)
        raise AssertionError


def fill(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Replace None by zeros; None if all are None."""
    present = next((x for x in tensors if x is not None), None)
    if present is None:
        return None
    return [torch.zeros_like(present) if x is None else x for x in tensors]


def _parameters(call: FallbackCall, names: list[str]) -> dict[str, Tensor]:
    """Parameters of the call's module by name, detached."""
    parameters = dict(call.module.named_parameters())
    return {name: parameters[name].detach() for name in names}
