"""Capture of the training batch: forward hooks on the object that the training loop calls."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import unserializable_hook

from fimprobe.training.backward_reach import Reach, current_reach
from fimprobe.training.captured_batch import CapturedBatch

StoreGradient = Callable[[CapturedBatch, Tensor], None]
"""Stores in a captured batch what is needed of a gradient."""

Watched = tuple[Tensor, StoreGradient]
"""An output whose gradient is needed, and what stores it."""


class BatchCapture:
    """Captures the batches that go forward in training mode with gradients enabled.

    A step may contain forwards whose outputs the loss does not use, such as one for a training
    metric. Hooks on the outputs therefore tie each captured forward to its backward pass, and
    ``last`` is the newest of those whose gradient travelled furthest (:class:`Reach`).

    Where a forward is not wanted, only its occurrence is noted.

    Args:
        model: The object that the loop calls.
        wanted: Returns at each such forward whether its batch may be measured.
        watch: Returns from (captured batch, what the model returned) the output whose gradient is
            needed as well, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Callable[[], bool],
        watch: Callable[[CapturedBatch, Any], Watched | None],
    ) -> None:
        self.model, self.wanted, self.watch = model, wanted, watch
        self.seen = False
        self.evaluations = 0
        self.failed: Exception | None = None
        self._candidates: list[CapturedBatch] = []
        self._running: list[CapturedBatch | None] = []
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._compiled: Any = None
        self._wrapper: Any = None
        self._wrap_compiled()

    @property
    def last(self) -> CapturedBatch | None:
        """The newest batch of those that a backward pass reached furthest; None if none is wanted."""
        newest_first = reversed(self._candidates)
        return max(newest_first, key=lambda batch: batch.reach, default=None)

    @property
    def backward_done(self) -> bool:
        """Whether a captured batch has its parameter gradients already."""
        last = self.last
        return last is not None and last.reach >= Reach.RETURNED

    def pop(self) -> tuple[bool, CapturedBatch | None]:
        """Return whether a forward was seen since the last call, and the batch if it was wanted."""
        seen, last = self.seen, self.last
        self.discard()
        self._wrap_compiled()  # the model may have been compiled since
        return seen, last

    def discard(self) -> None:
        """Forget all forwards since the last ``pop``."""
        self.seen = False
        self._candidates = []
        self._running = []  # a forward that raised never returned

    def remove(self) -> None:
        """Remove the hooks. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._wrapper is not None and self.model._compiled_call_impl is self._wrapper:
            self.model._compiled_call_impl = self._compiled
        self._compiled = self._wrapper = None
        self._candidates, self._running = [], []

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchCapture:
        """Return a capture that does nothing, for the hooks of a copied model."""
        return _without_model()

    def __reduce__(self) -> tuple[Callable[[], BatchCapture], tuple[()]]:
        """Pickle as a capture that does nothing."""
        return _without_model, ()

    def _wrap_compiled(self) -> None:
        """Observe a model on which ``compile()`` was called: its graph may leave the hooks out."""
        model, compiled = self.model, getattr(self.model, "_compiled_call_impl", None)
        if compiled is None or compiled is self._wrapper:
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(model, args, kwargs)
            out = compiled(*args, **kwargs)
            self._after(model, args, kwargs, out)
            return out

        model._compiled_call_impl = call
        self._compiled, self._wrapper = compiled, call

    def _observes(self, model: nn.Module) -> bool:
        # a copied model shares the hooks; inside a compiled graph they would break it
        return model is self.model and not torch.compiler.is_compiling() and torch.is_grad_enabled()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._observes(model):
            return
        if not model.training:
            self.evaluations += 1
            return
        self.seen = True
        batch: CapturedBatch | None = None
        try:
            if not self.wanted():
                return
            # a logging forward whose outputs are out of scope needs no memory any more
            self._candidates = [b for b in self._candidates if not b.graph_is_gone()]
            batch = CapturedBatch(args, dict(kwargs))
            self._candidates.append(batch)
        except Exception as error:  # reported at the step
            self.failed = error
        self._running.append(batch)

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if not self._observes(model) or not self._running or not model.training:
            return
        batch = self._running.pop()
        if batch is None:
            return
        if not self._candidates or batch is not self._candidates[-1]:
            # a forward that calls itself (Lightning under DDP): the inner call counts
            self._candidates = [b for b in self._candidates if b is not batch]
            return
        try:
            self._hook_outputs(batch, out)
        except Exception as error:
            self.failed = error

    def _hook_outputs(self, batch: CapturedBatch, out: Any) -> None:
        tensors = _differentiable_tensors(out)
        batch.reach = Reach.UNREACHED if tensors else Reach.UNKNOWN
        hook = self._gradient_hook(batch, None)
        for tensor in tensors:
            tensor.register_hook(hook)
        batch.hook = weakref.ref(hook) if tensors else None
        watched = self.watch(batch, out)
        if watched is not None and watched[0].requires_grad and watched[0].grad_fn is not None:
            batch.has_positions = watched[0].dim() > 2
            watched[0].register_hook(self._gradient_hook(batch, watched[1]))

    def _gradient_hook(
        self, batch: CapturedBatch, store: StoreGradient | None
    ) -> Callable[[Tensor], None]:
        # the graph may outlive the step, as where the loop keeps its loss: it holds no batch
        reference = weakref.ref(batch)

        @unserializable_hook
        def observe(gradient: Tensor | None) -> None:
            batch = reference()
            # under DDP, None arrives at outputs that the loss does not use
            if gradient is None or batch is None:
                return
            try:
                reach = current_reach(self.model)
                batch.reach = max(batch.reach, reach)
                if reach is Reach.ACCUMULATED and batch in self._candidates:
                    # earlier forwards cannot be chosen any more (gradient accumulation)
                    del self._candidates[: self._candidates.index(batch)]
                if store is not None and batch.accepts(reach):
                    store(batch, gradient)
            except Exception as error:  # out of memory
                self.failed = error

        return observe


def _differentiable_tensors(out: Any, depth: int = 4) -> list[Tensor]:
    """Return the tensors with a graph in what the model returned, and the bases of views.

    A hook is never set on a leaf: an output may be a parameter, where the hook would stay.
    """
    tensors: dict[int, Tensor] = {}
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            # an in-place operation on a view replaces its node; the gradient passes the base's
            for tensor in (leaf, leaf._base if leaf._is_view() else None):
                if tensor is not None and tensor.grad_fn is not None:
                    tensors[id(tensor)] = tensor
        elif depth and isinstance(leaf, Mapping):
            tensors |= {id(x): x for x in _differentiable_tensors(dict(leaf), depth - 1)}
        elif depth and dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = dict(vars(leaf))
            tensors |= {id(x): x for x in _differentiable_tensors(fields, depth - 1)}
    return list(tensors.values())


def _without_model() -> BatchCapture:
    """Return a capture of no model."""
    capture = BatchCapture.__new__(BatchCapture)
    capture.model = None  # type: ignore[assignment]
    capture._candidates, capture._running = [], []
    return capture
