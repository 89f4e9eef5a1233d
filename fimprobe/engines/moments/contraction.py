"""Moments of one parameter from all its uses, whose gradients are summed before any power.

Symbols: B samples, S draws, δ the cotangents at a use's output [B, ...], g per-sample gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.lookups import embedding_tokens
from fimprobe.engines.layers.rules import LINEAR
from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.moments.fused import ReachedUses, add_fused, find_operands
from fimprobe.engines.moments.power_sums import OuterProductPowers
from fimprobe.engines.moments.scaling import is_one, power_of_two_scale
from fimprobe.engines.problem.weights import PassWeights
from fimprobe.engines.tracing.tape import ParameterUse
from fimprobe.model.sample_dimension import batch_first

MAX_FLOAT64_GPU_ELEMENTS = 2**19
"""Gradients of up to so many entries are formed in float64 on a GPU.

Finding a scale for float32 would take more kernel launches than the arithmetic.
"""

CPU_CACHE_BYTES = 4 * 2**20
"""Maximum size of the gradients formed at once on a CPU: new pages cost more than arithmetic."""

ActiveUses = list[tuple[ParameterUse, LayerCall, list[Tensor]]]
"""Uses that cotangents reach: the use, its call in full precision, δ [B, ...] for each draw."""


@dataclass
class Contraction:
    """Adds parameters' moments over one chunk of samples.

    Attributes:
        size: Samples of the chunk.
        weights: Weights of its passes.
        room: Maximum size in bytes of the gradients formed at once.
        shared_powers: Powers of δ by edge, and whether δ was rescaled: the weight and the bias of a
            layer share them.
    """

    size: int
    weights: PassWeights | None
    room: float
    shared_powers: dict[tuple[int, bool], OuterProductPowers | None] = field(default_factory=dict)

    def add(
        self, accumulator: MomentAccumulator, reached: ReachedUses, *, rescale: bool = False
    ) -> bool:
        """Add the moments of one parameter, from all its uses.

        Args:
            accumulator: The parameter's accumulator.
            reached: Its uses that cotangents reach; at least one.
            rescale: Whether its gradients were scaled in the last chunk. If not, a CPU tries
                without a scale first.

        Returns:
            Whether its gradients were scaled.
        """
        operands = find_operands(reached, self.weights)
        if operands is not None:
            add_fused(accumulator, operands, self.weights)
            return rescale
        uses = in_full_precision(reached)
        use, _, deltas = uses[0]
        on_gpu = deltas[0].device.type != "cpu"
        # on a GPU the check for a scale would wait for the device: scale in any case
        rescale = rescale or (deltas[0].dtype != torch.float64 and on_gpu)
        if is_outer_product(reached):
            return self._outer_products(accumulator, uses, rescale)
        if len(uses) == 1 and use.rows is None and use.rule.lookup:
            return self._lookups(accumulator, uses, rescale)
        entries = len(deltas) * self.size * accumulator.a2.numel()
        if on_gpu and entries <= MAX_FLOAT64_GPU_ELEMENTS:
            everyone = slice(0, self.size)
            g = sum_uses(uses, everyone, None, accumulator.a2.shape, None).double()
            return not accumulator.add(g, everyone, ..., self.weights)
        return self._per_sample_gradients(accumulator, uses, rescale)

    def _outer_products(
        self, accumulator: MomentAccumulator, uses: ActiveUses, rescale: bool
    ) -> bool:
        """Add δ xᵀ or δ: one use, at one position of each sample."""
        use, call, delta = uses[0]
        x = call.inputs[0] if use.rule.outer else None
        for scaled in (True,) if rescale else (False, True):
            if (use.edge, scaled) not in self.shared_powers:
                stacked = _stack(use, delta, None, None)
                powers = OuterProductPowers.of(stacked, self.weights, rescale=scaled)
                self.shared_powers[use.edge, scaled] = powers
            rows = self.shared_powers[use.edge, scaled]
            if rows is not None and accumulator.add_outer_products(rows, x):
                break
        return scaled

    def _lookups(self, accumulator: MomentAccumulator, uses: ActiveUses, rescale: bool) -> bool:
        """Add the gradient of a lookup: only the rows of the tokens that occur."""
        use, call, delta = uses[0]
        while True:
            scale = _scale(uses) if rescale else None
            stacked = _stack(use, delta, None, scale)
            if accumulator.add_lookup_rows(*embedding_tokens(call, stacked), self.weights, scale):
                return rescale
            rescale = True

    def _per_sample_gradients(
        self, accumulator: MomentAccumulator, uses: ActiveUses, rescale: bool
    ) -> bool:
        """Add per-sample gradients, formed for some samples and rows of the parameter at once."""
        shape, size, room = accumulator.a2.shape, self.size, self.room
        delta = uses[0][2]
        if delta[0].device.type == "cpu":
            room = min(room, CPU_CACHE_BYTES)
        bytes_each = len(delta) * math.prod(shape) * delta[0].element_size()
        if delta[0].device.type == "cpu":
            joined = [u for u in uses if not _stacks_always(u[0])] if len(delta) > 1 else []
            bytes_each = max([bytes_each, *(_bytes(d) // size for _, _, d in joined)])
        separable = all(u.rule.row_separable and u.rows is None for u, _, _ in uses)
        tiled = separable and len(shape) > 0
        rows = shape[0] if tiled else 1
        step = max(1, min(size, int(room / bytes_each)))
        tile = rows if bytes_each <= room else max(1, int(rows * room / bytes_each))
        scale = _scale(uses) if rescale else None
        for start in range(0, size, step):
            samples = slice(start, min(start + step, size))
            weights = None if self.weights is None else self.weights.rows(samples)
            for row in range(0, rows, tile):
                where: Any = slice(row, row + tile) if tiled else ...
                while True:
                    g = sum_uses(uses, samples, where if tiled else None, shape, scale)
                    overwrite = all(_memory(g) != _memory(d) for _, _, ds in uses for d in ds)
                    if accumulator.add(g, samples, where, weights, scale, overwrite=overwrite):
                        break
                    # the gradients left float32's range: with a scale the next attempt succeeds
                    scale = _scale(uses)
        return scale is not None


def is_outer_product(reached: ReachedUses) -> bool:
    """Whether the only use is in a Linear layer that is applied at one position of each sample."""
    if len(reached) != 1 or reached[0][0].rows is not None:
        return False
    use = reached[0][0]
    return use.rule in (LINEAR["weight"], LINEAR["bias"]) and use.call.inputs[0].dim() == 2


def reached_uses(
    uses: list[ParameterUse], deltas: list[list[Tensor] | None], size: int
) -> ReachedUses:
    """The uses that cotangents reach, with those cotangents.

    Args:
        uses: All uses of one parameter.
        deltas: Cotangents by edge, one for each draw; None at edges that none reaches.
        size: Samples of the chunk.
    """
    return [(use, d) for use in uses if (d := use_deltas(use, deltas, size)) is not None]


def in_full_precision(reached: ReachedUses) -> ActiveUses:
    """The uses with their calls and cotangents in float32 at least."""
    uses: ActiveUses = []
    for use, delta in reached:
        inputs = tuple(at_least_float32(x) for x in use.call.inputs)
        call = LayerCall(use.call.module, inputs, use.call.folded)
        uses.append((use, call, [at_least_float32(d) for d in delta]))
    return uses


def flat_gradients(uses: ActiveUses, shape: torch.Size) -> Tensor:
    """Per-sample gradients of all samples, of a parameter of P entries.

    For parameters that are no larger than the layer's output, where all of them fit.

    Args:
        uses: The uses of the parameter that cotangents reach; at least one.
        shape: The parameter's shape.

    Returns:
        g [B, S, P], summed over the uses.
    """
    size, draws = len(uses[0][2][0]), len(uses[0][2])
    return sum_uses(uses, slice(0, size), None, shape, None).reshape(size, draws, -1)


def sum_uses(
    uses: ActiveUses, samples: slice, where: slice | None, shape: torch.Size, scale: Tensor | None
) -> Tensor:
    """Per-sample gradients summed over uses, before any power is formed.

    Args:
        uses: The uses that cotangents reach.
        samples: Samples to form gradients of.
        where: Rows of the parameter; None for all of it.
        shape: The parameter's shape.
        scale: The power of two to divide by; None for 1.

    Returns:
        Σ g / ``scale`` [b, S, *tile].
    """
    total: Tensor | None = None
    for use, call, delta in uses:
        rows = call.rows(samples)
        draws = delta
        if samples != slice(0, len(delta[0])):
            draws = [d[samples] for d in delta]
        fits = delta[0].device.type == "cpu" and _bytes(draws) <= CPU_CACHE_BYTES
        if fits or _stacks_always(use):
            g = use.rule.gradient(rows, _stack(use, draws, where, scale))
        else:
            # δ is larger than g here: form g draw by draw, and stack the gradients
            stacked = (_stack(use, [d], where, scale) for d in draws)
            gradients = [use.rule.gradient(rows, d) for d in stacked]
            g = gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)
        if use.rows is not None:
            if total is None:
                total = g.new_zeros(*g.shape[:2], *shape)
            total[:, :, use.rows] += g
        else:
            total = g if total is None else total + g
    assert total is not None
    return total


def use_deltas(
    use: ParameterUse, deltas: list[list[Tensor] | None], size: int
) -> list[Tensor] | None:
    """Select the cotangents of a use for each draw, and move their batch to the front.

    Args:
        use: A use of a parameter.
        deltas: Cotangents by edge, one for each draw; None at edges that none reaches.
        size: Samples B of the chunk.

    Returns:
        S tensors [B, ...]; None where no cotangent reaches the use.
    """
    delta = deltas[use.edge]
    return None if delta is None else [batch_first(d, use.layout, size) for d in delta]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision converted to float32: moments need its range and its digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stack(
    use: ParameterUse, delta: list[Tensor], where: slice | None, scale: Tensor | None
) -> Tensor:
    """δ [b, S, ...], of some rows of the parameter, divided by ``scale``."""
    draws = delta
    if where is not None and where != slice(0, draws[0].shape[-1]):
        draws = [d[..., where] for d in draws]
    stacked = draws[0].unsqueeze(1) if len(draws) == 1 else torch.stack(draws, 1)
    if scale is None or stacked.dtype == torch.float64 or is_one(scale):
        return stacked
    return stacked * (1 / scale).to(stacked.dtype)


def _stacks_always(use: ParameterUse) -> bool:
    """Whether the rule takes all draws at once, however large; others hold more than g meanwhile."""
    return use.rule.row_separable or use.rule.outer


def _bytes(tensors: list[Tensor]) -> int:
    """Size of all tensors, which have one shape and type."""
    return len(tensors) * tensors[0].numel() * tensors[0].element_size()


def _scale(uses: ActiveUses) -> Tensor:
    """A power of two that keeps fourth powers of the gradients in range; 1 in float64."""
    first = uses[0][2][0]
    if first.dtype == torch.float64:
        return torch.ones((), dtype=torch.float64, device=first.device)
    scales = [
        power_of_two_scale(d, *(call.inputs if use.rule.outer else ()))
        for use, call, delta in uses
        for d in delta
    ]
    return torch.stack(scales).max() if len(scales) > 1 else scales[0]


def _memory(x: Tensor) -> int:
    """Address of the tensor's storage."""
    return x.untyped_storage().data_ptr()
