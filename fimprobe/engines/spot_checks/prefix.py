"""Modules before the first shift of a pass: they are not run again, their outputs are known."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(kw_only=True)
class Prefix:
    """The order of calls in a forward pass, and the outputs of blocks.

    A block is an element of a ``ModuleList`` or ``Sequential`` that runs once and returns tensors
    with the batch as their first dimension.

    Attributes:
        twin: The model.
        starts: Number of the first call of each module path.
        ends: Number of calls that had begun when each block ended.
        outputs: What each block returned, for the whole batch.
    """

    twin: nn.Module
    starts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    def first_call(self, paths: Sequence[str]) -> int:
        """Number of the first call of any of these modules; 0 if one was not seen."""
        return min((self.starts.get(path, 0) for path in paths), default=0)

    @contextmanager
    def recorded(self, size: int, *, keep_outputs: bool) -> Iterator[None]:
        """Record one forward pass of some inputs of the batch, after those recorded before.

        Args:
            size: Number of these inputs.
            keep_outputs: Whether the outputs of blocks are kept.
        """
        calls = [0]
        ended: dict[str, list[Any]] = {}
        handles = []

        def begin(path: str, module: nn.Module, args: Any) -> None:
            calls[0] += 1
            self.starts.setdefault(path, calls[0])

        def end(path: str, module: nn.Module, args: Any, out: Any) -> None:
            ended.setdefault(path, []).append(out)
            self.ends[path] = calls[0]

        for path, module in self.twin.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(begin, path)))
            if keep_outputs and _is_block(self.twin, path) and "forward" not in module.__dict__:
                handles.append(module.register_forward_hook(functools.partial(end, path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for path, outs in ended.items():
            if len(outs) == 1 and _holds_batch(outs[0], size):
                out = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outs[0])
                before = self.outputs.get(path)
                self.outputs[path] = out if before is None else _joined(before, out)
            else:
                self.outputs.pop(path, None)

    @contextmanager
    def skipped(self, first: int, rows: Tensor) -> Iterator[None]:
        """Skip blocks that end before a call begins.

        Args:
            first: Number of that call.
            rows: Places of the inputs in the batch.
        """
        skipped: list[tuple[nn.Module, Any]] = []
        for path, out in self.outputs.items():
            if self.ends[path] < first:
                module = self.twin.get_submodule(path)
                known = tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, out)
                skipped.append((module, module.__dict__.get("forward")))
                module.forward = functools.partial(_return, known)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, before in skipped:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = before

    def num_bytes(self) -> int:
        """Memory of the outputs of blocks."""
        tensors = [x for x in tree_leaves(self.outputs) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def _return(known: Any, *args: Any, **kwargs: Any) -> Any:
    return known


def _is_block(twin: nn.Module, path: str) -> bool:
    parent = twin.get_submodule(path.rpartition(".")[0]) if path else None
    return isinstance(parent, (nn.ModuleList, nn.Sequential))


def _holds_batch(out: Any, size: int) -> bool:
    """Whether an output is a tensor, or a tuple of tensors and None, with the batch first."""
    if isinstance(out, Tensor):
        return out.dim() > 0 and out.shape[0] == size
    if not isinstance(out, tuple):
        return False
    return any(isinstance(x, Tensor) for x in out) and all(
        x is None or (isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == size) for x in out
    )


def _joined(before: Any, after: Any) -> Any:
    """Outputs of two parts of the batch, one after the other."""
    if isinstance(before, Tensor):
        return torch.cat([before, after])
    return tuple(None if x is None else torch.cat([x, y]) for x, y in zip(before, after, strict=True))
