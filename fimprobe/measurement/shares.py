"""What processes tell each other before they measure together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.distributed.processes import ProcessGroup
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp import is_part
from fimprobe.model.twin import trainable, unwrap


class _ProcessSummary(NamedTuple):
    """What the processes have to know of each other."""

    size: int
    widths: list[torch.Size] | None = None
    """Shapes of the inputs without the batch."""
    parameters: dict[str, tuple[torch.Size, float]] | None = None
    """Shapes, and norms of the first entries: unlike for models that were not kept the same."""
    buffers: Mapping[str, Tensor] = MappingProxyType({})
    """The first process's: running statistics differ, the model measured is one."""

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, ranks: ProcessGroup) -> _ProcessSummary:
        """What this process tells the others."""
        leaves = [x for x in tree_leaves((batch.args, batch.kwargs)) if isinstance(x, Tensor)]
        norms = {
            name: (p.shape, 0.0 if is_part(p) else _first_norm(p))
            for name, p in trainable(model).items()
        }
        buffers = {} if ranks.rank else {n: b.cpu() for n, b in _buffers(unwrap(model)).items()}
        return cls(batch.size, [x.shape[1:] for x in leaves if x.dim() > 0], norms, buffers)


def _first_norm(parameter: Tensor) -> float:
    return float(parameter.detach().reshape(-1)[:1000].double().norm())


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("_orig_mod.", ""): buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }


def _check_models_agree(shares: Sequence[_ProcessSummary]) -> None:
    """All processes have to hold the same model."""
    first = shares[0].parameters or {}
    for rank, share in enumerate(shares[1:], 1):
        here = share.parameters or {}
        for name in {**first, **here}:
            (shape, norm), (other, found) = first.get(name, _NONE), here.get(name, _NONE)
            same = abs(norm - found) <= 1e-3 * norm or norm != norm or found != found
            if shape != other or not same:
                raise FimprobeError(
                    f"parameter {name!r} of process {rank} is not that of process 0: processes that "
                    "measure together hold the same model, as DistributedDataParallel keeps it"
                )


_NONE = (None, 0.0)
