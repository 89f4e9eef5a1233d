"""Seeing the batch: a forward pre-hook on the object that the user calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Captured:
    """The arguments of the last training forward, the outputs' gradient once it is known."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.versions = _versions(args, kwargs)
        self.outputs: Tensor | None = None
        self.gradient: Tensor | None = None

    def unchanged(self) -> bool:
        """Whether no input tensor was written to since the forward."""
        return self.versions == _versions(self.args, self.kwargs)


class Capture:
    """Keeps the last batch that went forward in training mode with gradients on.

    ``watch(out)`` names the tensor whose gradient is wanted as well (None for none): it is asked at
    every forward. ``remove()`` leaves the model as it was.
    """

    def __init__(self, model: nn.Module, watch: Callable[[Any], Tensor | None]) -> None:
        self.model, self.watch = model, watch
        self.last: Captured | None = None
        self._open: list[Captured | None] = []
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

    def take(self) -> Captured | None:
        """The captured batch, forgotten here."""
        last, self.last = self.last, None
        self._open = []  # a forward that raised never came to its end
        self._wrap()  # the model may have been compiled since
        return last

    def remove(self) -> None:
        """Unhook; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._call is not None and self.model._compiled_call_impl is self._call:
            self.model._compiled_call_impl = self._compiled
        self._compiled = self._call = None
        self.last, self._open = None, []

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        """A copied model's hooks do nothing."""
        return _blind()

    def __reduce__(self) -> tuple[Callable[[], Capture], tuple[()]]:
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
        self.last = None
        try:
            self.last = Captured(args, dict(kwargs))
        except Exception as error:  # told at the step
            self.failed = error
        self._open.append(self.last)

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if not model.training or not self._seen(model):
            return
        captured = self._open.pop() if self._open else None
        if captured is None or captured is not self.last:
            return  # a forward that calls itself (Lightning under DDP): the inner one counts

        def keep(gradient: Tensor | None) -> None:
            if gradient is None:  # under DDP, of outputs that the loss was not made of
                return
            try:
                captured.gradient = gradient.detach().clone()
            except Exception as error:  # out of memory
                self.failed = error

        try:
            tensor = self.watch(out)
            if tensor is not None and tensor.requires_grad:
                captured.outputs = tensor.detach()
                tensor.register_hook(keep)
        except Exception as error:
            self.failed = error


def _blind() -> Capture:
    """A capture of no model."""
    capture = Capture.__new__(Capture)
    capture.model, capture.last, capture._open = None, None, []  # type: ignore[assignment]
    return capture


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [
        x._version
        for x in tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and not x.is_inference()
    ]
