"""The problem that an engine solves: a model, a batch, a likelihood, and what is requested."""

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
from fimprobe.model.batch_of_one import correct_gradient_of_one
from fimprobe.model.fsdp.shards import Shards
from fimprobe.model.leftovers import drop_leftovers

Outputs = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which statistics are computed besides those of Î₁.

    Attributes:
        i2: Whether Î₂ is requested.
        ih: Whether Î_H is requested.
        labels: The data's labels, for the empirical Fisher; None if it is not requested.
        bounds: Whether bounds are requested.
        probes: K, the number of random probes for second derivatives and for bounds.
        exact: Whether the diagonals of second derivatives are computed by BackPACK instead of
            probes, and the diagonal of F from all columns of a factor of I(h).
        spot_checks: Whether V2 is measured by spot checks. Second derivatives by double backward then
            serve bounds only.
        blocks: Whether these bounds and the blocks of R are measured beside spot checks.
        auto: Whether ``exact`` and ``spot_checks`` are for the measurement to choose.
        backpack: Whether BackPACK pulls these columns back, instead of the autograd engine.
    """

    i2: bool = False
    ih: bool = False
    labels: Tensor | None = None
    bounds: bool = False
    probes: int = 2
    exact: bool = False
    backpack: bool = False
    spot_checks: bool = False
    blocks: bool = True
    auto: bool = False

    @property
    def double_backward(self) -> bool:
        """Whether the graph is differentiated twice: for Î₂, unless spot checks are all it needs."""
        return self.i2 and ((self.bounds and self.blocks) or not self.spot_checks)

    @property
    def only_i1(self) -> bool:
        """Whether nothing but Î₁ is requested."""
        return not (self.i2 or self.ih or self.bounds or self.labels is not None)


@dataclass(kw_only=True)
class Problem:
    """One measurement, in the form that an engine needs.

    Attributes:
        twin: The copy of the model that is measured.
        batch: The inputs.
        likelihood: The distribution of labels given outputs.
        draws: How labels are drawn.
        select_outputs: Returns the tensor of outputs [B, ...] from what the model returns.
        mask: Labels that count, of the labels' shape; None for all.
        memory_mb: The memory limit in MB.
        diagonals: Whether sums are kept for every entry of every parameter.
        request: The statistics that are computed.
        shards: Set if FSDP shards the model. All processes then measure in the same steps.
        owners: The module that holds each parameter.
        parameters: Trainable parameters by name, each once.
        frozen: Names of the other parameters.
    """

    twin: nn.Module
    batch: Batch
    likelihood: Likelihood
    draws: Draws
    select_outputs: Outputs
    mask: Tensor | None
    memory_mb: float
    diagonals: bool
    request: Request = Request()
    shards: Shards | None = None

    def __post_init__(self) -> None:
        """Index the parameters and the modules that hold them; a tied parameter counts once."""
        self.owners: dict[str, nn.Module] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.frozen: set[str] = set()
        seen: set[int] = set()
        modules = dict(self.twin.named_modules())
        self._modules = list(modules.values())
        for path, module in modules.items():
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

    def evaluate(self, batch: Batch) -> Tensor:
        """Return the outputs h [b, ...] of some samples, detached.

        Autograd is on, as in training. Under ``torch.no_grad()`` torch's transformer layers compute
        something else at padded positions, and a forward that takes a derivative fails.

        Raises:
            FimprobeError: As :meth:`forward` does.
            BatchError: If some outputs are not finite.
        """
        return self.forward(batch).detach()

    def forward(self, batch: Batch, unchecked: list[Tensor] | None = None) -> Tensor:
        """Run the twin and check its outputs.

        Args:
            batch: Some samples of the batch.
            unchecked: If given, a GPU's outputs are not checked for finite values, because the CPU
                would wait for them. The counts [non-finite outputs, outputs] are appended instead.

        Returns:
            The outputs h [b, ...].

        Raises:
            FimprobeError: If the outputs do not have one row for each sample.
            BatchError: If some outputs are not finite.
        """
        # a forward may let its inputs require a gradient, which must not last
        args, kwargs = batch.map_tensors(Tensor.detach)
        drop_leftovers(self._modules)
        with nullcontext() if self.shards is None else self.shards.saving():
            h = self.select_outputs(self.twin(*args, **kwargs))
        if not isinstance(h, Tensor):
            raise FimprobeError(
                f"`output` must return the tensor of outputs [B, ...], got {type(h).__name__}. "
                "Select that tensor from what the model returns."
            )
        if h.dim() == 0 or h.shape[0] != batch.size:
            raise FimprobeError(
                f"the outputs must have one row for each of the {batch.size} samples, got shape "
                f"{tuple(h.shape)}. Let the batch be the first dimension of inputs and outputs, or "
                "pass `output`, a function that returns the outputs [B, ...]."
            )
        if batch.size == 1:
            correct_gradient_of_one([h])
        self.likelihood.check_outputs(h)
        if unchecked is not None and h.device.type != "cpu" and self.shards is None:
            non_finite = h.numel() - torch.isfinite(h).sum()
            unchecked.append(torch.stack([non_finite, torch.full_like(non_finite, h.numel())]))
            return h
        all_finite = _is_finite(h.detach())
        if self.shards is not None and self.shards.smallest(int(all_finite)) < all_finite:
            raise BatchError("another process's outputs are not finite")
        if not all_finite:
            non_finite = (~torch.isfinite(h)).sum().cpu()
            check_finite([torch.stack([non_finite, torch.tensor(h.numel())])])
        return h


def _is_finite(h: Tensor) -> bool:
    """Whether all outputs are finite. Their sum is then finite too, as a rule, and fast to check."""
    return bool(h.sum().isfinite()) or bool(torch.isfinite(h).all())


def check_finite(counts: Sequence[Tensor]) -> None:
    """Raise :class:`BatchError` if some outputs were not finite.

    Args:
        counts: [non-finite outputs, outputs] of each chunk.
    """
    non_finite, numel = (sum(int(count[i]) for count in counts) for i in range(2))
    if non_finite:
        raise BatchError(
            f"{non_finite} of {numel} outputs are not finite (NaN or infinite). "
            "Check the inputs, the learning rate and the model's precision."
        )


class MemoryLimitExceeded(Exception):
    """A chunk needs more memory than the limit; a chunk of ``feasible`` samples should not."""

    def __init__(self, feasible: int) -> None:
        super().__init__(feasible)
        self.feasible = max(1, feasible)
