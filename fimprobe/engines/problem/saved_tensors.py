"""The memory that a forward pass keeps for its backward pass, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe.engines.problem.problem import MemoryLimitExceeded, Problem
from fimprobe.model.batch import Batch


def outputs_in_parts(problem: Problem, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
    """Run the twin on a batch, in as many passes as half of ``memory_mb`` requires.

    Args:
        problem: The model and the memory limit.
        batch: The samples.

    Yields:
        Some of the samples, and their outputs [b, ...] with the graph.
    """
    start, step, limited = 0, batch.size, True
    while start < batch.size:
        part = batch if step >= batch.size else batch[slice(start, start + step)]
        limit = limit_saved_bytes(problem, part.size) if limited else nullcontext()
        try:
            with torch.enable_grad(), limit:
                outputs = problem.forward(part)
        except MemoryLimitExceeded as exceeded:
            step = exceeded.feasible
            continue
        except RuntimeError as error:
            if not (limited and forbids_hooks(error)):
                raise
            limited = False
            continue
        yield part, outputs
        start += part.size


def forbids_hooks(error: RuntimeError) -> bool:
    """Return whether a forward failed because it uses ``torch.func`` under hooks on saved tensors."""
    return "saved tensor hooks" in str(error)


@contextmanager
def limit_saved_bytes(problem: Problem, size: int) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves, without those of the parameters and the batch.

    Half of ``memory_mb`` is the limit during the forward pass: the other half remains for the
    backward pass.

    Args:
        problem: The model, its batch and the memory limit.
        size: Number of samples in the forward pass.

    Yields:
        A function that returns the bytes saved so far.

    Raises:
        MemoryLimitExceeded: If half of ``memory_mb`` is exceeded and ``size`` can be halved.
    """
    seen = {p.untyped_storage().data_ptr() for p in problem.twin.parameters()}
    given = tree_leaves((problem.batch.args, problem.batch.kwargs))
    seen |= {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        try:
            storage = x.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        except (RuntimeError, NotImplementedError):  # tensors without storage
            pass
        if total > problem.memory_mb * 2**19 and size > 1:
            raise MemoryLimitExceeded(size // 2)
        # a saved output would keep its own graph alive: a reference cycle that is never freed
        return x if x.grad_fn is None else x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # the hooks of sharded models run inside these and count their own bytes
        yield lambda: total if problem.shards is None else problem.shards.bytes
