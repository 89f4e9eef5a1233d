"""Seeing the batch: a forward pre-hook on the object that the user calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class CapturedBatch:
    """The arguments of a training forward, and what its backward told.

    ``outputs`` and ``gradient`` are there where the family or the labels are to be read off them,
    ``read`` where only the positions are asked for that the loss read. They are the training's own
    tensors, not copies.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.versions = _versions(args, kwargs)
        self.outputs: Tensor | None = None
        self.read: Tensor | None = None
        self._gradient: tuple[Tensor, int] | None = None

    @property
    def gradient(self) -> Tensor | None:
        """At the outputs; None where none arrived, or where it was written to since."""
        if self._gradient is None or self._gradient[0]._version != self._gradient[1]:
            return None
        return self._gradient[0].detach()

    def keep(self, gradient: Tensor) -> None:
        """Remember the gradient: the tensor itself, so that backward does not reuse its memory."""
        kept = gradient.detach() if gradient.requires_grad else gradient
        self._gradient = (kept, kept._version)

    def unchanged(self) -> bool:
        """Whether no input tensor was written to since the forward."""
        return self.versions == _versions(self.args, self.kwargs)

    def drop(self) -> None:
        """Let go of all tensors."""
        self.args, self.kwargs = (), {}
        self.outputs = self.read = self._gradient = None


Watched = tuple[Tensor, Callable[[CapturedBatch, Tensor], None]]
"""A tensor whose gradient is wanted, and what takes the gradient."""


class BatchCapture:
    """Keeps the last batch that went forward in training mode with gradients on.

    ``wanted()`` says at every such forward whether the batch may be measured: where it may not, the
    hooks note only that there was one. ``watch(captured, out)`` names the tensor whose gradient is
    wanted as well (None for none). ``remove()`` leaves the model as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Callable[[], bool],
        watch: Callable[[CapturedBatch, Any], Watched | None],
    ) -> None:
        self.model, self.wanted, self.watch = model, wanted, watch
        self.seen = False
        self.last: CapturedBatch | None = None
        self._open: list[CapturedBatch | None] = []
        self.evaluations = 0
        self.failed: Exception | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._compiled: Any = None
        self._call: Any = None
        self._wrap()

    def _wrap(self) -> None:
        """Where ``model.compile()`` was called: its graph has the hooks baked in or left out."""
        model, compiled = self.model, getattr(self.model, "_compiled_call_impl", None)
        if compiled is None or compiled is self._call:
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(model, args, kwargs)
            out = compiled(*args, **kwargs)
            self._after(model, args, kwargs, out)
            return out

        model._compiled_call_impl = call
        self._compiled, self._call = compiled, call

    def take(self) -> tuple[bool, CapturedBatch | None]:
        """Whether a batch was seen since the last call, and the batch if it was wanted."""
        seen, last = self.seen, self.last
        self.seen, self.last = False, None
        self._open = []  # a forward that raised never came to its end
        self._wrap()  # the model may have been compiled since
        return seen, last

    def remove(self) -> None:
        """Unhook; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._call is not None and self.model._compiled_call_impl is self._call:
            self.model._compiled_call_impl = self._compiled
        self._compiled = self._call = None
        self.last, self._open = None, []

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchCapture:
        """A copied model's hooks do nothing."""
        return _blind()

    def __reduce__(self) -> tuple[Callable[[], BatchCapture], tuple[()]]:
        """A pickled model's neither."""
        return _blind, ()

    def _seen(self, model: nn.Module) -> bool:
        # a copied model shares the hooks; inside a compiled graph they would break it
        return model is self.model and not torch.compiler.is_compiling() and torch.is_grad_enabled()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._seen(model):
            return
        if not model.training:
            self.evaluations += 1
            return
        self.seen, self.last = True, None
        try:
            if not self.wanted():
                return
            self.last = CapturedBatch(args, dict(kwargs))
        except Exception as error:  # told at the step
            self.failed = error
        self._open.append(self.last)

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if not self._seen(model) or not self._open or not model.training:
            return
        captured = self._open.pop()
        if captured is None or captured is not self.last:
            return  # a forward that calls itself (Lightning under DDP): the inner one counts
        try:
            watched = self.watch(captured, out)
            if watched is not None and watched[0].requires_grad:
                watched[0].register_hook(self._hook(captured, watched[1]))
        except Exception as error:
            self.failed = error

    def _hook(
        self, captured: CapturedBatch, take: Callable[[CapturedBatch, Tensor], None]
    ) -> Callable[[Tensor], None]:
        # the graph may outlive the step, as where the loop keeps its loss: it holds no batch
        there = weakref.ref(captured)

        def arrived(gradient: Tensor | None) -> None:
            captured = there()
            # under DDP there is none of outputs that the loss was not made of
            if gradient is None or captured is None:
                return
            try:
                take(captured, gradient)
            except Exception as error:  # out of memory
                self.failed = error

        return arrived


def _blind() -> BatchCapture:
    """A capture of no model."""
    capture = BatchCapture.__new__(BatchCapture)
    capture.model, capture.last, capture._open = None, None, []  # type: ignore[assignment]
    return capture


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [
        x._version
        for x in tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and not x.is_inference()
    ]
