"""Moments of one batch after the other, with one twin and one verified plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.autograd.sample_checks import measure_and_check
from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.problem.cotangents import masked
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.problem.saved_tensors import outputs_in_parts
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.plan import Plan
from fimprobe.fisher.sums.indexed_draws import IndexedDraws
from fimprobe.likelihoods.base import Likelihood, Pass
from fimprobe.likelihoods.size_biased import (
    MIN_EXPECTED_SQUARE,
    SizeBiasedScores,
    expected_squares,
    has_size_biased_draws,
    make_sampler,
)
from fimprobe.measurement.process_summary import float_buffers
from fimprobe.model.batch import Batch
from fimprobe.model.input_roles import InputRoles, make_twin_for_batch
from fimprobe.model.outputs import selector_for
from fimprobe.model.twin import trainable, unwrap
from fimprobe.statistics import MomentsBatch


class TraceWeighted:
    """A family for inputs that were drawn in proportion to τ: each counts with the weight τ̄/τ.

    The weight is a function of the outputs, and multiplies squares of scores.

    Args:
        family: The family.
        mean: τ̄, the mean of τ over the data set.
    """

    def __init__(self, family: Likelihood, mean: float) -> None:
        self.family: Any = family
        self.mean = mean

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    @property
    def name(self) -> str:
        """The name of the family."""
        return str(self.family.name)

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the family's labels at ``uniforms``."""
        labels: Tensor = self.family.quantile(outputs, uniforms)
        return labels

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the family's score of ``labels``."""
        score: Tensor = self.family.score(outputs, labels)
        return score

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the family's size-biased labels at ``uniforms``."""
        labels: Tensor = self.family.size_biased_quantile(outputs, uniforms)
        return labels

    def size_biased_sampler(self, outputs: Tensor, mask: Tensor | None) -> Any:
        """Return the family's sampler with weighted scores."""
        return _WeightedSampler(make_sampler(self.family, outputs, mask), self.mean)

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield the family's passes with weighted squares."""
        expected = expected_squares(self.family, outputs, mask)
        assert expected is not None
        weight = _input_weights(expected, self.mean)
        for one in self.family.exact_passes(outputs, mask):
            square, quartic = one.square * weight, one.quartic * weight.square()
            yield one._replace(square=square, quartic=quartic)


class _WeightedSampler:
    """Draws whose squared scores are multiplied by τ̄/τ."""

    def __init__(self, sampler: Any, mean: float) -> None:
        self.sampler, self.mean = sampler, mean

    def draw(self, uniforms: Tensor, positions: Tensor) -> SizeBiasedScores:
        """Draw as the family does, and weight the scores."""
        drawn: SizeBiasedScores = self.sampler.draw(uniforms, positions)
        weight = _input_weights(drawn.expected, self.mean)
        root = weight.sqrt().to(drawn.scores.dtype).view(-1, *[1] * (drawn.scores.dim() - 1))
        # the moments of 1/w are those of g⁴ with labels from the model, which are not used here
        return replace(
            drawn,
            scores=drawn.scores * root,
            square=drawn.square * weight,
            expected=drawn.expected * weight,
        )


def _input_weights(expected: Tensor, mean: float) -> Tensor:
    valid = expected > MIN_EXPECTED_SQUARE
    return torch.where(valid, mean / expected.where(valid, 1), 0)


ScoreOfLabels = Callable[[Tensor, Tensor], Tensor]
"""From outputs h [B, ...] and labels of the data to vectors of the outputs' shape."""


class ScoredLabels:
    """A family whose score at labels of the data is another function.

    Args:
        family: The family.
        score: From outputs and labels to vectors of the outputs' shape.
    """

    size_biased_quantile = None
    """No size-biased labels: the scores of drawn labels are not used."""

    def __init__(self, family: Likelihood, score: ScoreOfLabels) -> None:
        self.family: Any = family
        self.data_score = score

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


@dataclass(kw_only=True)
class Measurer:
    """Measures batches of one model.

    Attributes:
        model: The model; it is read only.
        likelihood: The family of labels.
        output: From what the model returns to the outputs; None for the usual places.
        memory_mb: The memory limit in MB.
        seed: The random seed of the labels.
        plan: How parameters are reached; verified with the first batch.
        buffers: Floating-point buffers of the first of several processes, which replace this one's.
    """

    model: nn.Module
    likelihood: Likelihood
    output: Callable[[Any], Tensor] | None
    memory_mb: float
    seed: int
    plan: Plan = field(default_factory=Plan)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    _twin: nn.Module | None = field(init=False, default=None)

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, each once."""
        return {name: p.detach() for name, p in trainable(self.model).items()}

    @property
    def notes(self) -> list[str]:
        """What the comparison of the twin with the model found."""
        return [] if self.plan.twin is None else list(self.plan.twin.notes)

    def _twin_for(self, batch: Batch) -> tuple[nn.Module, Batch]:
        """The twin, compared with the model on the first batch, and the batch with its roles."""
        roles = self.plan.input_roles
        batch = roles.apply(batch)
        if self._twin is None or roles.undecided(batch):
            select = selector_for(self.likelihood, self.output)
            self._twin, self.plan.twin, batch = make_twin_for_batch(
                self.model, batch, select, self.plan.twin, roles
            )
            for name, buffer in float_buffers(self._twin).items():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])
        return self._twin, batch

    def moments(
        self,
        batch: Batch,
        mask: Tensor | None,
        indices: Tensor,
        draws: int | None,
        mean_expected: float | None = None,
    ) -> MomentsBatch:
        """Return the moments of a batch with those of every entry.

        Args:
            batch: The inputs.
            mask: Labels that count.
            indices: Numbers of the inputs [B], which determine their labels.
            draws: Labels per input; None for exact ones.
            mean_expected: τ̄ where inputs were drawn in proportion to τ.
        """
        problem = self._verified(self._problem(batch, mask, indices, draws))
        if mean_expected is not None:
            weighted: Any = TraceWeighted(self.likelihood, mean_expected)
            problem = replace(problem, likelihood=weighted)
        return measure_and_check(problem, self.plan, 1).moments["i1"]

    def moments_of(
        self, batch: Batch, mask: Tensor | None, labels: Tensor, score: ScoreOfLabels
    ) -> MomentsBatch:
        """Return the moments of one given vector for each input, as those of an exact expectation.

        Args:
            batch: The inputs.
            mask: Labels that count.
            labels: Handed to ``score``, batch first.
            score: From the outputs [B, ...] and the labels to vectors of the outputs' shape.
        """
        problem = self._verified(self._problem(batch, mask, torch.arange(batch.size), 1))
        scored: Any = ScoredLabels(self.likelihood, score)
        problem = replace(
            problem,
            likelihood=scored,
            draws=replace(problem.draws, size_biased=False),
            request=Request(labels=labels),
        )
        moments = measure_with_fallbacks(problem, self.plan).moments["empirical"]
        return replace(moments, draws=None, square_weights=torch.ones(batch.size, 1))

    def summed_gradients(
        self,
        batch: Batch,
        mask: Tensor | None,
        labels: Tensor,
        scores: Mapping[str, ScoreOfLabels],
    ) -> dict[str, dict[str, Tensor]]:
        """Return the sums over a batch of the per-sample gradients of :meth:`moments_of`.

        Args:
            batch: The inputs.
            mask: Labels that count.
            labels: Handed to the scores, batch first.
            scores: From the outputs [B, ...] and the labels to vectors of the outputs' shape.

        Returns:
            Gradients by score and parameter; zeros where the outputs do not depend on it.
        """
        problem = self._problem(batch, mask, torch.arange(batch.size), 1)
        h = problem.forward(problem.batch)
        rows, parameters = slice(0, batch.size), problem.parameters
        sums = {}
        for key, score in scores.items():
            vector = masked(problem, rows, h, score(h.detach(), labels.to(h.device)))
            gradients = torch.autograd.grad(
                h, list(parameters.values()), vector, allow_unused=True, retain_graph=True
            )
            sums[key] = {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), gradients, strict=True)
            }
        return sums

    def _verified(self, problem: Problem) -> Problem:
        """The problem, after the first ones have filled and verified the plan."""
        samples = self.plan.verified_samples
        if not samples or (samples == 1 and problem.batch.size > 1):
            verified = make_verified_plan(problem)
            verified.twin, verified.input_roles = self.plan.twin, self.plan.input_roles
            for f in fields(Plan):
                setattr(self.plan, f.name, getattr(verified, f.name))
        return problem

    def expected(self, batch: Batch, mask: Tensor | None) -> Tensor | None:
        """Return τ of every input [B], float64 on the CPU; None where the family has none."""
        outputs = self.outputs(batch, mask)
        squares = expected_squares(self.likelihood, outputs, mask)
        return None if squares is None else squares.cpu()

    def outputs(self, batch: Batch, mask: Tensor | None) -> Tensor:
        """Return the outputs [B, ...] of a batch."""
        problem = self._problem(batch, mask, torch.arange(batch.size), 1)
        return torch.cat([h.detach() for _, h in outputs_in_parts(problem, problem.batch)])

    def count_passes(self, batch: Batch) -> int:
        """Return the number of backward passes of exact labels."""
        return self.likelihood.count_passes(self.outputs(batch[:1], None))

    def can_draw_inputs(self, batch: Batch, mask: Tensor | None) -> bool:
        """Return whether inputs may be drawn in proportion to τ: that is of use for rare labels."""
        return has_size_biased_draws(
            self.likelihood, self.outputs(batch[:1], None if mask is None else mask[:1])
        )

    def _problem(
        self, batch: Batch, mask: Tensor | None, indices: Tensor, draws: int | None
    ) -> Problem:
        twin, batch = self._twin_for(batch.to(next(unwrap(self.model).parameters()).dtype))
        return Problem(
            twin=twin,
            batch=batch,
            likelihood=self.likelihood,
            draws=IndexedDraws(count=draws, seed=self.seed, size_biased=True, indices=indices),
            select_outputs=selector_for(self.likelihood, self.output),
            mask=mask,
            memory_mb=self.memory_mb,
            diagonals=True,
            request=Request(),
        )


def plan_to_state(plan: Plan) -> dict[str, Any]:
    """Return what a plan has learned, as plain values: without it a resumed run would round anew."""
    return {
        "layouts": {k: sorted(v) if isinstance(v, set) else v for k, v in vars(plan.layouts).items()},
        "fallbacks": plan.fallbacks,
        "unvectorized": sorted(plan.unvectorized),
        "unused": sorted(plan.unused),
        "chunk_size": plan.chunk_size,
        "rescaled": sorted(plan.rescaled),
        "verified_samples": plan.verified_samples,
        "input_roles": plan.input_roles.batched,
    }


def plan_from_state(state: dict[str, Any]) -> Plan:
    """Return the plan of :func:`plan_to_state`."""
    layouts = BatchLayouts(**{**state["layouts"], "unsure": set(state["layouts"]["unsure"])})
    return Plan(
        layouts=layouts,
        fallbacks=state["fallbacks"],
        unvectorized=set(state["unvectorized"]),
        unused=set(state["unused"]),
        chunk_size=state["chunk_size"],
        rescaled=set(state["rescaled"]),
        verified_samples=state["verified_samples"],
        input_roles=InputRoles(state.get("input_roles", {})),
    )


DEFAULT_LABELS = 2
"""Labels per input of ``draws="auto"``: two separate the error of labels from that of inputs."""
