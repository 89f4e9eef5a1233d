"""What the engine is asked, and what it knows about the model: the problem and the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp import Shards

Outputs = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Request:
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
    ask: Request = Request()
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


class MemoryLimitExceeded(Exception):
    """A chunk needs more memory than the ceiling; ``fit`` samples should not."""

    def __init__(self, fit: int) -> None:
        super().__init__(fit)
        self.fit = max(1, fit)
