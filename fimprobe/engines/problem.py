"""What the engine is asked, and what it knows about the model: the problem and the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.batch import Batch
from fimprobe.engines.layouts import Layouts
from fimprobe.engines.rules import rules_for
from fimprobe.engines.unrolled import UNROLLED
from fimprobe.sharded import Shards
from fimprobe.types import BatchError, Draws, FimprobeError, Likelihood

Outputs = Callable[[Any], Tensor]


@dataclass
class Plan:
    """How each parameter is reached; made and verified on the first samples, then reused.

    ``replay`` maps a parameter to the module replayed for it, ``loop`` names the modules that
    ``vmap`` cannot run, ``unused`` the parameters the outputs do not depend on.
    """

    layouts: Layouts = field(default_factory=Layouts)
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


@dataclass(frozen=True)
class Ask:
    """What is measured beside Î₁: Î₂, Î_H, the empirical Fisher, bounds, by K ``probes`` each.

    ``exact``: diagonals of second derivatives by BackPACK, in place of probes, and of F by all
    columns of I(h)'s root, pulled back by the autograd engine or, where ``backpack``, by that one.
    """

    i2: bool = False
    ih: bool = False
    labels: Tensor | None = None
    bounds: bool = False
    probes: int = 2
    exact: bool = False
    backpack: bool = False


@dataclass
class Problem:
    """One measurement's question, as the engine needs it."""

    twin: nn.Module
    batch: Batch
    likelihood: Likelihood
    draws: Draws
    outputs: Outputs
    mask: Tensor | None
    memory_mb: float
    diagonals: bool
    ask: Ask = Ask()
    shards: Shards | None = None
    """Of a model that FSDP shards; then all processes measure in the same steps."""

    def __post_init__(self) -> None:
        """Index the parameters, each once, those that train, and the modules that hold them."""
        self.owners: dict[str, nn.Module] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.frozen: set[str] = set()
        seen: set[int] = set()
        for path, module in self.twin.named_modules():
            for local, p in module._parameters.items():
                if p is None or id(p) in seen:
                    continue
                seen.add(id(p))
                name = f"{path}.{local}" if path else local
                self.owners[name] = module
                if p.requires_grad:
                    self.parameters[name] = p
                else:
                    self.frozen.add(name)

    def forward(self, batch: Batch, unseen: list[Tensor] | None = None) -> Tensor:
        """The outputs for a part of the batch, checked.

        ``unseen`` takes the numbers [not finite, of] where a GPU would have to be waited for.
        """
        with nullcontext() if self.shards is None else self.shards.saving():
            h = self.outputs(self.twin(*batch.args, **batch.kwargs))
        if not isinstance(h, Tensor):
            raise FimprobeError(
                f"output= returns {type(h).__name__}; let it return the tensor of outputs [B, ...]"
            )
        if h.dim() == 0 or h.shape[0] != batch.size:
            raise FimprobeError(
                f"the outputs have shape {tuple(h.shape)}, but the batch holds {batch.size} "
                "samples; give inputs and outputs batch first, or pass output= a function that "
                "returns the outputs [B, ...]"
            )
        self.likelihood.check_outputs(h)
        if unseen is not None and h.device.type != "cpu" and self.shards is None:
            wrong = h.numel() - torch.isfinite(h).sum()
            unseen.append(torch.stack([wrong, torch.full_like(wrong, h.numel())]))
            return h
        finite = torch.isfinite(h)
        well = bool(finite.all())
        if self.shards is not None and self.shards.smallest(int(well)) < well:
            raise BatchError("another process's outputs are not finite")
        if not well:
            check_finite([torch.stack([(~finite).sum().cpu(), torch.tensor(h.numel())])])
        return h


def check_finite(counts: Sequence[Tensor]) -> None:
    """Raise :class:`BatchError` where some outputs were not finite: [count, of] of each chunk."""
    wrong, numel = (sum(int(count[i]) for count in counts) for i in range(2))
    if wrong:
        raise BatchError(
            f"{wrong} of {numel} outputs are not finite (NaN or infinite); "
            "look at the inputs, the learning rate and the model's precision"
        )


class OverMemory(Exception):
    """A chunk needs more memory than the ceiling; ``fit`` samples should not."""

    def __init__(self, fit: int) -> None:
        super().__init__(fit)
        self.fit = max(1, fit)


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
