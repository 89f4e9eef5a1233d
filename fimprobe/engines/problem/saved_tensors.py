"""What a forward pass keeps for its backward, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fimprobe.engines.problem.problem import MemoryLimitExceeded, Problem


@contextmanager
def limit_saved_bytes(problem: Problem, size: int) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves; the parameters' and the batch's own do not count.

    Raises:
        OverMemory: past half of ``memory_mb``, where ``size`` samples can be halved.
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
        return x.detach()  # an output saved as it is would keep its own graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # shards have hooks of their own, inside of these
        yield lambda: total if problem.shards is None else problem.shards.bytes
