"""Summaries that processes compare before they measure together: models and sizes of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp.placement import is_part
from fimprobe.model.twin import trainable, unwrap

COMPARED_ENTRIES = 1000
"""Entries of each parameter whose norm is compared: enough to see another model, few to read."""

NORM_TOLERANCE = 1e-3
"""Relative difference of norms above which models differ; rounding in bfloat16 stays below."""


@dataclass(frozen=True, kw_only=True)
class ProcessSummary:
    """Summary of the model and batch of a process, sent to the others before a measurement.

    Attributes:
        size: Number of samples in its batch.
        input_shapes: Shapes of its inputs without the batch dimension.
        parameters: Shape of each trainable parameter, and the norm of its first entries.
        buffers: Floating-point buffers of the first process: running statistics differ between
            processes, but one model is measured.
    """

    size: int
    input_shapes: Sequence[torch.Size] = ()
    parameters: Mapping[str, tuple[torch.Size, float]] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


def summarize(model: nn.Module, batch: Batch, *, rank: int) -> ProcessSummary:
    """Return the summary of one process; only the first process sends its buffers.

    Args:
        model: The model of this process.
        batch: The batch of this process.
        rank: Number of this process, from 0.
    """
    inputs = [x for x in tree_leaves((batch.args, batch.kwargs)) if isinstance(x, Tensor)]
    return ProcessSummary(
        size=batch.size,
        input_shapes=[x.shape[1:] for x in inputs if x.dim() > 0],
        parameters={
            name: (p.shape, 0.0 if is_part(p) else _first_norm(p))
            for name, p in trainable(model).items()
        },
        buffers={} if rank else {n: b.cpu() for n, b in float_buffers(unwrap(model)).items()},
    )


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers by name, without the prefix of ``torch.compile``."""
    return {
        name.replace("_orig_mod.", ""): buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }


def check_models_agree(summaries: Sequence[ProcessSummary]) -> None:
    """Compare the models of all processes.

    Raises:
        FimprobeError: If a parameter of some process differs from that of process 0.
    """
    reference = summaries[0].parameters
    for rank, summary in enumerate(summaries[1:], 1):
        for name in {**reference, **summary.parameters}:
            shape, norm = reference.get(name, (None, 0.0))
            other_shape, other_norm = summary.parameters.get(name, (None, 0.0))
            either_is_nan = norm != norm or other_norm != other_norm
            similar = abs(norm - other_norm) <= NORM_TOLERANCE * norm or either_is_nan
            if shape != other_shape or not similar:
                raise FimprobeError(
                    f"parameter {name!r} must be equal in all processes, but process {rank} holds "
                    "another one than process 0. Keep the models equal, as "
                    "DistributedDataParallel does."
                )


def _first_norm(parameter: Tensor) -> float:
    return float(parameter.detach().reshape(-1)[:COMPARED_ENTRIES].double().norm())
