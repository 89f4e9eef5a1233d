"""Per-sample gradients of one parameter, and their tangents, from the cotangents at its uses.

Symbols: B samples of the chunk, b of them at once, δ the cotangent at a use's output z, x its input.
A dot denotes the derivative along a direction. Gradients are [b, n, *shape] for n vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.curvature.directions import ParameterDirection
from fimprobe.engines.curvature.double_backward import EdgeTangents, PulledBackVector
from fimprobe.engines.curvature.fallback_derivatives import (
    COTANGENTS_ONLY,
    FallbackDerivatives,
    Motion,
    OptionalTensors,
    fill,
)
from fimprobe.engines.curvature.shared_evaluations import SharedEvaluations
from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.rules import LINEAR, GradientRule
from fimprobe.engines.moments.contraction import at_least_float32, sum_uses
from fimprobe.engines.primitives.products import jvp
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.parameter_uses import ParameterUses
from fimprobe.engines.tracing.tape import ParameterUse
from fimprobe.model.sample_dimension import batch_first


@dataclass(kw_only=True)
class ParameterDerivatives:
    """Pulls cotangents back to one parameter, for each sample, summed over the parameter's uses.

    Attributes:
        chunk: The recorded forward pass.
        uses: The parameter's uses in it.
        name: The parameter's name.
        direction: The direction in which parameters move; None if they do not.
        shared: Evaluations of fallback calls that their parameters share.
    """

    chunk: Chunk
    uses: ParameterUses
    name: str
    direction: ParameterDirection | None = None
    shared: SharedEvaluations | None = None
    shape: torch.Size = field(init=False)
    """The parameter's shape."""

    def __post_init__(self) -> None:
        """Note the parameter's shape."""
        self.shape = self.chunk.problem.parameters[self.name].shape

    def only_use(self) -> ParameterUse | None:
        """The use of the whole parameter under a rule, if that is its only use."""
        uses = self.uses.rule_uses
        if len(uses) != 1 or self.uses.fallback_calls:
            return None
        return None if uses[0].rows is not None or uses[0].per_step else uses[0]

    def outer_product_use(self) -> ParameterUse | None:
        """The only use, if each sample's gradient is an outer product δ xᵀ."""
        use = self.only_use()
        if use is None or use.rule is not LINEAR["weight"] or use.call.inputs[0].dim() != 2:
            return None
        return use

    def matrix_use(self) -> ParameterUse | None:
        """The only use, if the gradient is Σ_t δ_t x_tᵀ and inner products over t are cheaper."""
        use = self.only_use()
        if use is None or not (use.rule.outer and use.rule.linear):
            return None
        x = use.call.inputs[0]
        rows = self.shape.numel() // x.shape[-1]
        length = math.prod(x.shape[1:-1])
        if length > 1 and length * (rows + x.shape[-1]) > 2 * self.shape.numel():
            return None
        return use

    def lookup_use(self) -> ParameterUse | None:
        """The only use, if the gradient has non-zero rows for the sample's tokens only."""
        use = self.only_use()
        return use if use is not None and use.rule.lookup else None

    def cotangents_at(
        self, use: ParameterUse, cotangents: Sequence[OptionalTensors]
    ) -> list[Tensor] | None:
        """Select the cotangents at a use's output.

        Args:
            use: A use of the parameter.
            cotangents: For each of n vectors, the cotangents by output edge.

        Returns:
            n tensors [B, ...]; None if no vector reaches the use.
        """
        at_use = fill([edges[use.edge] for edges in cotangents])
        if at_use is None:
            return None
        return [at_least_float32(batch_first(d, use.layout, self.chunk.size)) for d in at_use]

    def gradients(self, cotangents: Sequence[OptionalTensors], samples: slice) -> Tensor | None:
        """Pull cotangents back to the parameter.

        Args:
            cotangents: For each of n vectors, the cotangents by output edge.
            samples: The b samples.

        Returns:
            [b, n, *shape]; None if no vector reaches the parameter.
        """
        total = self._rule_gradients(cotangents, samples)
        fallbacks = FallbackDerivatives(chunk=self.chunk, shared=self.shared)
        for local_call in self.uses.fallback_calls:
            total = _add(total, fallbacks.gradients(local_call, cotangents, samples))
        return total

    def gradient_tangents(
        self,
        tangents: Sequence[EdgeTangents],
        vectors: Sequence[PulledBackVector],
        samples: slice,
        motion: Motion = COTANGENTS_ONLY,
    ) -> Tensor | None:
        """Differentiate the parameter's gradients along directions.

        Args:
            tangents: For each of n vectors, δ̇ and ẋ for its direction.
            vectors: The vectors that are pulled back, with their cotangents δ.
            samples: The b samples.
            motion: What moves, apart from δ.

        Returns:
            [b, n, *shape]; None for zero.
        """
        total = self._rule_gradients([t.cotangents for t in tangents], samples)
        if motion.inputs and self.uses.rule_uses:
            edges = [vector.edges for vector in vectors]
            if all(t.inputs is tangents[0].inputs for t in tangents):
                g = self._input_contribution(tangents[0], edges, samples)
            else:
                each = zip(tangents, edges, strict=True)
                g = _join([self._input_contribution(t, [e], samples) for t, e in each])
            if g is not None:
                total = _add(total, motion.inputs * g)
        fallbacks = FallbackDerivatives(
            chunk=self.chunk, direction=self.direction, shared=self.shared
        )
        for local_call in self.uses.fallback_calls:
            pairs = zip(tangents, vectors, strict=True)
            g = _join([fallbacks.tangents(local_call, t, v, samples, motion) for t, v in pairs])
            total = _add(total, g)
        return total

    def input_tangents(
        self, use: ParameterUse, tangents: EdgeTangents
    ) -> tuple[Tensor | None, ...] | None:
        """The tangents ẋ of the inputs of a use.

        Args:
            use: A use of the parameter.
            tangents: δ̇ and ẋ for the direction.

        Returns:
            ẋ [B, ...] of each input, and None for one that does not move. The inputs of a use in T
            time steps are joined to one [B, T, ...]. None in place of the tuple if no input moves.
        """
        moves = [None if i is None else tangents.inputs[i] for i in use.input_edges]
        if all(x is None for x in moves):
            return None
        if use.per_step:
            like = next(x for x in moves if x is not None)
            steps = torch.stack([torch.zeros_like(like) if x is None else x for x in moves])
            return (at_least_float32(batch_first(steps, use.layout, self.chunk.size)),)
        return tuple(
            None if x is None else at_least_float32(batch_first(x, use.layout, self.chunk.size))
            for x in moves
        )

    def _rule_gradients(self, cotangents: Sequence[OptionalTensors], samples: slice) -> Tensor | None:
        """Gradients [b, n, *shape] from the uses under a rule; None if no vector reaches them."""
        uses = []
        for use in self.uses.rule_uses:
            at_use = self.cotangents_at(use, cotangents)
            if at_use is not None:
                uses.append((use, _in_full_precision(use), at_use))
        if not uses:
            return None
        unscaled = torch.ones((), dtype=torch.float64, device=uses[0][2][0].device)
        return sum_uses(uses, samples, None, self.shape, unscaled)

    def _input_contribution(
        self, tangents: EdgeTangents, deltas: Sequence[OptionalTensors], samples: slice
    ) -> Tensor | None:
        """Σ δ ẋᵀ [b, n, *shape]: the part of the tangents that comes from moving inputs.

        Args:
            tangents: ẋ, which the n vectors share.
            deltas: For each vector, δ by output edge.
            samples: The b samples.
        """
        total: Tensor | None = None
        for use in self.uses.rule_uses:
            at_use = self.cotangents_at(use, deltas)
            x = self.input_tangents(use, tangents)
            if at_use is None or x is None:
                continue
            total = _add(total, _rule_tangent(use, x, at_use, samples, self.shape))
        return total


def _join(tangents: list[Tensor | None]) -> Tensor | None:
    """Stack [b, 1, ...] of n vectors to [b, n, ...], where None is zero; None if all are zero."""
    filled = fill(tangents)
    if filled is None or len(filled) == 1:
        return None if filled is None else filled[0]
    return torch.cat(filled, 1)


def _add(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The sum, where None is zero."""
    if total is None or x is None:
        return x if total is None else total
    return total + x


def _in_full_precision(use: ParameterUse) -> LayerCall:
    """The use's call with inputs in float32 at least."""
    inputs = tuple(at_least_float32(x) for x in use.call.inputs)
    return LayerCall(use.call.module, inputs, use.call.folded)


def _rule_tangent(
    use: ParameterUse,
    input_tangents: tuple[Tensor | None, ...],
    delta: Sequence[Tensor],
    samples: slice,
    shape: torch.Size,
) -> Tensor:
    """Differentiate a rule's gradient with respect to the use's inputs: Σ δ ẋᵀ for a linear layer.

    Args:
        use: The use.
        input_tangents: ẋ [B, ...] of each input; None for one that does not move.
        delta: δ [B, ...] of each of n vectors.
        samples: The b samples.
        shape: The parameter's shape.

    Returns:
        [b, n, *shape].
    """
    rule: GradientRule = use.rule
    cotangent = torch.stack([d[samples] for d in delta], 1)
    call = _in_full_precision(use).rows(samples)
    if rule.linear:
        assert input_tangents[0] is not None
        moved = LayerCall(call.module, (input_tangents[0][samples],), call.folded)
        g = rule.gradient(moved, cotangent)
    else:
        moving = [i for i, v in enumerate(input_tangents) if v is not None]

        def gradient(*moved_inputs: Tensor) -> Tensor:
            inputs = list(call.inputs)
            for i, x in zip(moving, moved_inputs, strict=True):
                inputs[i] = x
            return rule.gradient(LayerCall(call.module, tuple(inputs), call.folded), cotangent)

        primals = tuple(call.inputs[i] for i in moving)
        tangents = tuple(v[samples] for v in input_tangents if v is not None)
        g = jvp(gradient, primals, tangents)
    if use.rows is not None:
        packed = g.new_zeros(*g.shape[:2], *shape)
        packed[:, :, use.rows] = g
        return packed
    return g
