"""What second derivatives by probes will cost where modules are evaluated again, before they begin.

A rule takes one double backward for all samples and layers. A module without a rule is evaluated
again for each vector, each probe and each of its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from fimprobe.engines.layers.decompositions import UNROLLED
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.plan import Plan

_PASSES_OF_VMAP = 9.0
"""Forward and backward passes of a module that one evaluation takes under ``vmap``: 5 to 11 where it
was measured (T5, XLNet, ViT, BEiT, EVA-02, CaiT, with layers so small that Python dominates)."""

_PASSES_OF_A_LOOP = 3.0
"""The same for each sample of a loop: a forward, its backward, and the backward of both."""


@dataclass(frozen=True, kw_only=True)
class ReplayCost:
    """The estimated cost of evaluating modules again.

    Attributes:
        passes: Forward and backward passes of the whole model.
        largest: The module with the largest share; "" for the whole model.
        others: Number of other modules.
    """

    passes: float
    largest: str
    others: int

    @property
    def place(self) -> str:
        """The modules in words."""
        name = repr(self.largest) if self.largest else "the whole model"
        more = f" and {self.others} more modules" if self.others > 1 else ""
        return name + (" and one more module" if self.others == 1 else more)


def estimate_replays(problem: Problem, plan: Plan) -> ReplayCost:
    """Estimate the cost of all evaluations of a second-order pass by probes.

    The share of a module in the cost of the model is taken as its share of the parameter tensors.

    Args:
        problem: The measurement.
        plan: A verified plan.
    """
    count = problem.draws.count
    vectors = count or problem.likelihood.count_passes(problem.evaluate(problem.batch[:1]))
    probes = problem.request.probes
    names = {id(p): n for n, p in problem.parameters.items()}
    total = max(len(problem.parameters), 1)
    costs: dict[str, float] = {}
    for path, members in _replayed(problem, plan).items():
        module = problem.twin.get_submodule(path)
        share = sum(id(p) in names for p in module.parameters()) / total
        # the diagonal, and two sides of a block and one of the whole matrix
        evaluations = vectors * (1 + probes + probes * len(members)) + 3 * vectors
        looped = path in plan.unvectorized
        passes = _PASSES_OF_A_LOOP * problem.batch.size if looped else _PASSES_OF_VMAP
        costs[path] = evaluations * passes * share
    largest = max(costs, key=lambda path: costs[path], default="")
    return ReplayCost(passes=sum(costs.values()), largest=largest, others=len(costs) - 1)


def _replayed(problem: Problem, plan: Plan) -> dict[str, list[str]]:
    """The parameters that no rule reaches, by the path of the module that is evaluated again."""
    members: dict[str, list[str]] = {}
    for name, owner in problem.owners.items():
        if name in problem.frozen or name in plan.unused:
            continue
        by_rule = name.rpartition(".")[2] in rules_for(owner) or type(owner) in UNROLLED
        if name in plan.fallbacks or not by_rule:
            path = plan.fallbacks.get(name, name.rpartition(".")[0])
            members.setdefault(path, []).append(name)
    return members
