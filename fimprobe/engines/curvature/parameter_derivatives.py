"""From what arrives at the edges back to one parameter: gradients and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.curvature.double_backward import Curve
from fimprobe.engines.layers.per_sample import per_sample_vjp, per_sample_vjp_tangent
from fimprobe.engines.layers.rules import LINEAR, GradientRule, LayerCall
from fimprobe.engines.moments.contraction import precise, sum_uses
from fimprobe.engines.primitives.products import jvp
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import batch_first
from fimprobe.engines.tracing.parameter_uses import ParameterUses
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.tape import FallbackCall, ParameterUse
from fimprobe.model.batch import Batch

OptionalTensors = Sequence[Tensor | None]


@dataclass
class ParameterDerivatives:
    """Pulls what arrives at the edges back to one parameter, per sample, summed over its uses."""

    problem: Problem
    plan: Plan
    site: ParameterUses
    name: str
    size: int
    along: dict[str, Tensor] = field(default_factory=dict)
    flips: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note the parameter's shape, and its names inside replayed modules."""
        self.shape = self.problem.parameters[self.name].shape
        self.names = {id(p): n for n, p in self.problem.parameters.items()}

    def single(self) -> ParameterUse | None:
        """The one use of a whole parameter under a rule, where that is all there is."""
        uses = self.site.uses
        if len(uses) == 1 and not self.site.calls and uses[0].rows is None and not uses[0].steps:
            return uses[0]
        return None

    def outer(self) -> ParameterUse | None:
        """The use, where the gradient is an outer product δ xᵀ for each sample."""
        use = self.single()
        if use is None or use.rule is not LINEAR["weight"] or use.call.inputs[0].dim() != 2:
            return None
        return use

    def matrix(self) -> ParameterUse | None:
        """The use, where the gradient is Σ_t δ_t x_tᵀ and the sums over t are the shorter ones."""
        use = self.single()
        if use is None or not (use.rule.outer and use.rule.linear):
            return None
        x = use.call.inputs[0]
        rows = self.shape.numel() // x.shape[-1]
        length = math.prod(x.shape[1:-1])
        if length > 1 and length * (rows + x.shape[-1]) > 2 * self.shape.numel():
            return None
        return use

    def tokens(self) -> ParameterUse | None:
        """The use, where only the rows of the sample's tokens differ from zero."""
        use = self.single()
        return use if use is not None and use.rule.tokens else None

    def at(self, use: ParameterUse, arriving: Sequence[OptionalTensors]) -> list[Tensor] | None:
        """What arrives at a use, batch first, for each in ``arriving``; None where nothing does."""
        parts = [a[use.edge] for a in arriving]
        present = next((p for p in parts if p is not None), None)
        if present is None:
            return None
        filled = [torch.zeros_like(present) if p is None else p for p in parts]
        return [precise(batch_first(p, use.layout, self.size)) for p in filled]

    def first(self, arriving: Sequence[OptionalTensors], samples: slice) -> Tensor | None:
        """Jᵀ of what arrives: [b, len(arriving), *shape]."""
        total = self._uses(arriving, samples)
        for call, local in self.site.calls:
            if call.path == "":
                continue
            seeds: list[Tensor | None] = []
            for edge in call.edges:
                parts = [None if edge is None else a[edge] for a in arriving]
                present = next((p for p in parts if p is not None), None)
                if present is None:
                    seeds.append(None)
                    continue
                filled = [torch.zeros_like(present) if p is None else p for p in parts]
                seeds.append(torch.stack([p[samples] for p in filled], 1))
            if all(s is None for s in seeds):
                continue
            inside = {local: _inside(call, local)}
            found = self._replayed(
                call,
                lambda v, args, kwargs, size, inside=inside, seeds=seeds, call=call: per_sample_vjp(
                    call.module, inside, args, kwargs, seeds, batch_size=size, vectorise=v
                ),
                samples,
            )
            g = precise(found[local])
            total = g if total is None else total + g
        return total

    def _uses(self, arriving: Sequence[OptionalTensors], samples: slice) -> Tensor | None:
        live = []
        for use in self.site.uses:
            parts = self.at(use, arriving)
            if parts is not None:
                call = LayerCall(
                    use.call.module, tuple(precise(x) for x in use.call.inputs), use.call.folded
                )
                live.append((use, call, parts))
        if not live:
            return None
        one = torch.ones((), dtype=torch.float64, device=live[0][2][0].device)
        return sum_uses(live, samples, None, self.shape, one)

    def moved(self, curve: Curve, delta: OptionalTensors, samples: slice) -> Tensor | None:
        """The part of the gradient's derivative that comes from the inputs: Σ δ ẋᵀ [b, 1, *shape]."""
        total: Tensor | None = None
        for use in self.site.uses:
            parts = self.at(use, [delta])
            x = self.input_direction(use, curve)
            if parts is None or x is None:
                continue
            inputs = tuple(precise(i) for i in use.call.inputs)
            call = LayerCall(use.call.module, inputs, use.call.folded)
            g = _rule_tangent(use, call, x, parts[0], samples, self.shape)
            total = g if total is None else total + g
        return total

    def input_direction(self, use: ParameterUse, curve: Curve) -> tuple[Tensor | None, ...] | None:
        """How a use's inputs move, batch first; None where they do not."""
        parts = [None if i is None else curve.inputs[i] for i in use.sources]
        if all(p is None for p in parts):
            return None
        if use.steps:
            like = next(p for p in parts if p is not None)
            stacked = torch.stack([torch.zeros_like(like) if p is None else p for p in parts])
            return (precise(batch_first(stacked, use.layout, self.size)),)
        return tuple(
            None if p is None else precise(batch_first(p, use.layout, self.size)) for p in parts
        )

    def second(
        self,
        curve: Curve,
        delta: OptionalTensors,
        samples: slice,
        *,
        inputs: float = 0.0,
        within: bool = False,
        everything: bool = False,
        flipped: bool = False,
    ) -> Tensor | None:
        """The gradient's derivative along a direction: [b, 1, *shape].

        ``inputs``: the factor of the part that comes from the calls' inputs. ``within``: the
        parameters that a replayed call stands for move as well; ``everything``: all inside it do.
        """
        total = self._uses([curve.edges], samples)
        if inputs and self.site.uses:
            g = self.moved(curve, delta, samples)
            if g is not None:
                total = inputs * g if total is None else total + inputs * g
        for call, local in self.site.calls:
            g = self._fallback_tangents(
                call,
                local,
                curve,
                delta,
                samples,
                inputs=inputs,
                within=within,
                everything=everything,
                flipped=flipped,
            )
            if g is not None:
                total = g if total is None else total + g
        return total

    def _fallback_tangents(
        self,
        call: FallbackCall,
        local: str,
        curve: Curve,
        delta: OptionalTensors,
        samples: slice,
        *,
        inputs: float = 0.0,
        within: bool = False,
        everything: bool = False,
        flipped: bool = False,
    ) -> Tensor | None:
        """One replayed call's part of :meth:`second`."""
        along: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        if within or everything:
            for n, p in call.module.named_parameters():
                name = self.names.get(id(p))
                if name not in self.along or not (everything or self._stands_for(call, name)):
                    continue
                along[n] = self.along[name]
                if flipped:
                    scales[n] = self.flips[name][samples]
        if call.path == "":
            seeds: list[Tensor | None] = [self.output_seed[samples]]
            bend: list[Tensor | None] = [None]
            moves: list[Tensor | None] = []
        else:
            seeds = [_rows(delta, e, samples) for e in call.edges]
            bend = [_rows(curve.edges, e, samples) for e in call.edges]
            steps = [
                _rows(curve.inputs, i, samples, self.size) if inputs else None for i in call.sources
            ]
            moves = [None if x is None else inputs * x for x in steps]
            seeds = [
                torch.zeros_like(b) if s is None and b is not None else s
                for s, b in zip(seeds, bend, strict=True)
            ]
            if all(s is None for s in seeds):
                return None
        if not along and all(b is None for b in bend) and all(m is None for m in moves):
            return None
        select: Any = (lambda out: [self.problem.outputs(out)]) if call.path == "" else None
        found = self._replayed(
            call,
            lambda v, args, kwargs, size: per_sample_vjp_tangent(
                call.module,
                {local: _inside(call, local)},
                along,
                scales,
                args,
                kwargs,
                moves,
                seeds,
                bend,
                batch_size=size,
                select=select,
                vectorise=v,
            ),
            samples,
        )
        return precise(found[local]).unsqueeze(1)

    output_seed: Tensor = field(init=False, repr=False)
    """The seed at the outputs, for calls of the whole model."""

    def _stands_for(self, call: FallbackCall, name: str) -> bool:
        planned = self.plan.replay.get(name)
        return planned == call.path if planned is not None else True

    def _replayed(
        self, call: FallbackCall, run: Callable[..., dict[str, Tensor]], samples: slice
    ) -> dict[str, Tensor]:
        cut = Batch(call.args, call.kwargs, self.size)[samples]
        for vectorise in (True, False) if call.path not in self.plan.loop else (False,):
            try:
                return run(vectorise, cut.args, cut.kwargs, cut.size)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if not vectorise:
                    raise
                self.plan.loop.add(call.path)
        raise AssertionError


def _rows(
    tensors: OptionalTensors, index: int | None, samples: slice, size: int | None = None
) -> Tensor | None:
    """The samples' rows; of a tensor that has no batch of ``size``, all."""
    x = None if index is None else tensors[index]
    if x is None or (size is not None and (x.dim() == 0 or x.shape[0] != size)):
        return x
    return x[samples]


def _inside(call: FallbackCall, local: str) -> Tensor:
    return dict(call.module.named_parameters())[local].detach()


def _rule_tangent(
    use: ParameterUse,
    call: LayerCall,
    x: tuple[Tensor | None, ...],
    delta: Tensor,
    samples: slice,
    shape: torch.Size,
) -> Tensor:
    """Σ δ ẋᵀ of one use: the rule's derivative in its input."""
    rule: GradientRule = use.rule
    seed = delta[samples].unsqueeze(1)
    at = call.rows(samples)
    if rule.linear:
        assert x[0] is not None
        g = rule.gradient(LayerCall(at.module, (x[0][samples],), at.folded), seed)
    else:
        moving = [i for i, v in enumerate(x) if v is not None]

        def f(*parts: Tensor) -> Tensor:
            inputs = list(at.inputs)
            for i, part in zip(moving, parts, strict=True):
                inputs[i] = part
            return rule.gradient(LayerCall(at.module, tuple(inputs), at.folded), seed)

        primals = tuple(at.inputs[i] for i in moving)
        tangents = tuple(v[samples] for v in x if v is not None)
        g = jvp(f, primals, tangents)
    if use.rows is not None:
        whole = g.new_zeros(*g.shape[:2], *shape)
        whole[:, :, use.rows] = g
        return whole
    return g
