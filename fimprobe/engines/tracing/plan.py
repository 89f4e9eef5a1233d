"""How each parameter is reached, and what contradicts that."""

from __future__ import annotations

from dataclasses import dataclass, field

from fimprobe.engines.layers.decompositions import UNROLLED
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import BatchLayouts


@dataclass
class Plan:
    """How each parameter is reached; made and verified on the first samples, then reused.

    ``replay`` maps a parameter to the module replayed for it, ``loop`` names the modules that
    ``vmap`` cannot run, ``unused`` the parameters the outputs do not depend on.
    """

    layouts: BatchLayouts = field(default_factory=BatchLayouts)
    replay: dict[str, str] = field(default_factory=dict)
    loop: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    chunk: int | None = None
    rescale: set[str] = field(default_factory=set)
    """Parameters whose gradients' fourth powers left float32's range."""
    curved: int = 0
    """Samples on which second derivatives were compared."""
    uncurved: str = ""
    """Why there are no second derivatives."""
    kinks: list[str] | None = None
    backpack: dict[bool, dict[str, str]] | None = None
    verified: int = 0
    """Samples that the guard has compared; 0 before it ran."""


class PlanMismatch(Exception):
    """The plan does not fit this batch: parameter or module -> reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


def coverage(problem: Problem, plan: Plan) -> dict[str, str]:
    """Parameter -> how it is measured, or why not."""
    told = {}
    for name, owner in problem.owners.items():
        if name in problem.frozen:
            told[name] = "left out: frozen"
        elif name in plan.unused:
            told[name] = "left out: the outputs do not depend on it"
        elif name in plan.replay or not rules_for(owner):
            path = plan.replay.get(name, name.rpartition(".")[0])
            if name not in plan.replay and type(owner) in UNROLLED:
                told[name] = f"autograd: {type(owner).__name__} written out"
            else:
                how = "loop over samples" if path in plan.loop else "vmap"
                told[name] = f"autograd: replay of {path or 'the whole model'} ({how})"
        else:
            told[name] = f"autograd: {type(owner).__name__} rule"
    return told
