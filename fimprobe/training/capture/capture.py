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

from fimprobe.errors import ErrorHandler, guarded
from fimprobe.model.weak_model import WeakModel
from fimprobe.training.capture.backward_reach import Reach, current_reach
from fimprobe.training.capture.captured_batch import CapturedBatch
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.capture.hook_table import remove_hooks, set_hooks

StoreGradient = Callable[[CapturedOutput, Tensor], None]
"""Stores in a captured batch what is needed of a gradient."""

Watched = dict[str, tuple[Tensor, StoreGradient]]
"""The outputs whose gradients are needed, and what stores them; keys of ``CapturedBatch.heads``."""


class BatchCapture:
    """Captures the batches that go forward in training mode with gradients enabled.

    A step may contain forwards whose outputs the loss does not use, such as one for a training
    metric. Hooks on the outputs therefore tie each captured forward to its backward pass, and
    ``last`` is the newest of those whose gradient travelled furthest (:class:`Reach`).

    Where a forward is not wanted, only its occurrence is noted.

    Args:
        model: The object that the loop calls.
        wanted: Returns at each such forward whether its batch may be measured.
        watch: Returns from (captured batch, what the model returned) the outputs whose gradients are
            needed as well.
        errors: Keeps the errors of hooks for the next step.
    """

    model = WeakModel()

    def __init__(
        self,
        model: nn.Module,
        wanted: Callable[[], bool],
        watch: Callable[[CapturedBatch, Any], Watched],
        errors: ErrorHandler,
    ) -> None:
        self.model, self.wanted, self.watch = model, wanted, watch
        self.errors = errors
        self.seen = False
        self.evaluations = 0
        self._candidates: list[CapturedBatch] = []
        self._running: list[CapturedBatch | None] = []
        self._compiled: Any = None
        self._wrapper: Any = None
        try:
            set_hooks(model, self._before, self._after)
            self._wrap_compiled()
        except BaseException:
            self.remove()
            raise

    @property
    def last(self) -> CapturedBatch | None:
        """The newest batch of those that a backward pass reached furthest; None if none is wanted."""
        newest_first = reversed(self._candidates)
        return max(newest_first, key=lambda batch: batch.reach, default=None)

    @property
    def is_running(self) -> bool:
        """Whether a captured forward has not returned yet."""
        return bool(self._running)

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
        """Remove the hooks from a model that still exists. Calling it again does nothing."""
        self._candidates, self._running = [], []
        model, compiled, wrapper = self.model, self._compiled, self._wrapper
        self._compiled = self._wrapper = None
        remove_hooks(model)
        if wrapper is not None and model._compiled_call_impl is wrapper:
            model._compiled_call_impl = compiled

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
        # a replica shares the hooks of its model; a trace would record what is done with its tensors
        return model is self.model and torch.is_grad_enabled() and not torch.jit.is_tracing()

    @guarded()
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._observes(model):
            return
        if not model.training:
            self.evaluations += 1
            return
        wanted = self.wanted()  # it may end the step before
        self.seen = True
        if not wanted:
            return
        # a logging forward whose outputs are out of scope needs no memory any more
        self._candidates = [b for b in self._candidates if not b.graph_is_gone()]
        batch = CapturedBatch(args, dict(kwargs))
        self._candidates.append(batch)
        self._running.append(batch)

    @guarded()
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
        self._hook_outputs(batch, out)

    def _hook_outputs(self, batch: CapturedBatch, out: Any) -> None:
        tensors = _differentiable_tensors(out)
        batch.reach = Reach.UNREACHED if tensors else Reach.UNKNOWN
        hook = self._gradient_hook(batch)
        for tensor in tensors:
            tensor.register_hook(hook)
        batch.hook = weakref.ref(hook) if tensors else None
        for head, (output, store) in self.watch(batch, out).items():
            if output.requires_grad and output.grad_fn is not None:
                output.register_hook(self._gradient_hook(batch, head, store))

    def _gradient_hook(
        self, batch: CapturedBatch, head: str = "", store: StoreGradient | None = None
    ) -> Callable[[Tensor], None]:
        # the graph may outlive the step, as where the loop keeps its loss: it holds no batch
        reference = weakref.ref(batch)

        @unserializable_hook
        def observe(gradient: Tensor | None) -> None:
            batch = reference()
            # under DDP, None arrives at outputs that the loss does not use
            if gradient is not None and batch is not None:
                self._observe_gradient(batch, head, store, gradient)

        return observe

    @guarded()
    def _observe_gradient(
        self, batch: CapturedBatch, head: str, store: StoreGradient | None, gradient: Tensor
    ) -> None:
        reach = current_reach(self.model)
        batch.reach = max(batch.reach, reach)
        if reach is Reach.ACCUMULATED and batch in self._candidates:
            # earlier forwards cannot be chosen any more (gradient accumulation)
            del self._candidates[: self._candidates.index(batch)]
        if store is not None and batch.heads[head].accepts(reach):
            store(batch.heads[head], gradient)


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
