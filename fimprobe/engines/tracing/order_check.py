"""Whether the inputs of layers follow the samples, where shapes in the forward depend on data."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.layout_trace import is_close
from fimprobe.engines.tracing.plan import PlanMismatch
from fimprobe.engines.tracing.recording import record_forward
from fimprobe.engines.tracing.tape import Tape
from fimprobe.model.batch import Batch
from fimprobe.model.runs import rounding_tolerance
from fimprobe.model.sample_dimension import batch_first


def check_order(problem: Problem, layouts: BatchLayouts, batch: Batch, tape: Tape) -> None:
    """Compare the inputs of layers with those of the same samples in another order.

    Only modules whose layout may depend on data are compared. Tokens that are dealt out to the wrong
    samples do not follow the samples when these move.

    Args:
        problem: The measurement.
        layouts: The layouts.
        batch: The samples [b, ...].
        tape: Their recorded forward pass.

    Raises:
        PlanMismatch: With the modules whose inputs do not follow the samples.
    """
    if batch.size == 1 or not layouts.unsure:
        return
    # a cyclic shift would not move tokens to other samples where the last one has the mean length
    order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(batch.size))
    with record_forward(problem.twin, batch.size, layouts, {}) as rolled_tape:
        problem.forward(batch[order])
    expected, rolled = _inputs_by_path(tape), _inputs_by_path(rolled_tape)
    failures = {}
    for path in layouts.unsure & set(expected):
        layout = layouts.of[path]
        assert layout is not None
        pairs = list(zip(expected[path], rolled.get(path, []), strict=False))
        follows = len(pairs) == len(expected[path]) == len(rolled.get(path, [])) and all(
            y.shape == x.shape
            and is_close(
                batch_first(x, layout, batch.size)[order.to(x.device)],
                batch_first(y, layout, batch.size),
                rounding_tolerance(x.dtype),
            )
            for x, y in pairs
        )
        if not follows:
            failures[path] = "its inputs do not follow the order of the samples"
    if failures:
        raise PlanMismatch(failures)


def _inputs_by_path(tape: Tape) -> dict[str, list[Tensor]]:
    inputs: dict[str, list[Tensor]] = {}
    for x, _, path in tape.versions:
        inputs.setdefault(path, []).append(x.detach())
    return inputs
