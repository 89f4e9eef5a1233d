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
        self.evaluations = 0
        self._compiled: Any = None
        before = torch._dynamo.disable(self._before) if _uses_dynamo(model) else self._before
        after = torch._dynamo.disable(self._after) if _uses_dynamo(model) else self._after
        self._handles: list[Any] = []
        if getattr(model, "_compiled_call_impl", None) is not None:
            # model.compile(): the compiled call has its hooks baked in, so it is wrapped instead
            compiled: Any = model._compiled_call_impl
            self._compiled = compiled

            def call(*args: Any, **kwargs: Any) -> Any:
                self._before(model, args, kwargs)
                out = compiled(*args, **kwargs)
                self._after(model, args, kwargs, out)
                return out

            model._compiled_call_impl = call
        else:
            self._handles = [
                model.register_forward_pre_hook(before, with_kwargs=True),
                model.register_forward_hook(after, with_kwargs=True),
            ]

    def take(self) -> Captured | None:
        """The captured batch, forgotten here."""
        last, self.last = self.last, None
        return last

    def remove(self) -> None:
        """Unhook; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._compiled is not None:
            self.model._compiled_call_impl = self._compiled
            self._compiled = None
        self.last = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            if model.training:
                self.last = Captured(args, dict(kwargs))
            else:
                self.evaluations += 1

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        captured = self.last
        if captured is None or not model.training or not torch.is_grad_enabled():
            return
        tensor = self.watch(out)
        if tensor is not None and tensor.requires_grad:
            captured.outputs = tensor.detach()

            def keep(gradient: Tensor) -> None:
                captured.gradient = gradient.detach().clone()

            tensor.register_hook(keep)


def _uses_dynamo(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod")


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [
        x._version
        for x in tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and not x.is_inference()
    ]
