"""Forwards without activation checkpointing.

A checkpointed segment runs again in the backward pass. The layers that a measurement records or
writes out would not be the same ones then, and the reentrant kind has no gradient at inner layers.
A measurement keeps the inputs of all layers, so that checkpoints would save next to nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map

from fimprobe.model.process_wide import Inside, hold


def without_checkpoints() -> AbstractContextManager[None]:
    """Let checkpointed segments run as plain functions, in this thread and inside the context.

    ``torch.utils.checkpoint`` has no switch for this. Its two entries are replaced for the time in
    which a thread is inside the context; other threads pass through to the original ones.
    """
    return hold(_SWITCH.enter, _SWITCH.leave)


class _Switch:
    """Replaces the entries while at least one context lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._all: WeakSet[Inside] = WeakSet()
        self._original_generator: Callable[..., Any] | None = None

    @property
    def is_on(self) -> bool:
        """Whether this thread is inside a context."""
        return len(self._of_thread) > 0

    @property
    def _of_thread(self) -> WeakSet[Inside]:
        """The contexts of this thread."""
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = WeakSet()
        contexts: WeakSet[Inside] = self._thread.contexts
        return contexts

    def enter(self, inside: Inside) -> None:
        """Count a context of this thread in, and replace the entries if they are torch's."""
        with self._lock:
            self._all.add(inside)
            self._install()
        self._of_thread.add(inside)

    def leave(self, inside: Inside) -> None:
        """Count a context of this thread out, and put the entries back if it was the last one."""
        self._of_thread.discard(inside)
        with self._lock:
            self._all.discard(inside)
            if not self._all:
                self._remove()

    def _install(self) -> None:
        generator = getattr(torch_checkpoint, _GENERATOR, None)
        if generator is not _run_generator:
            self._original_generator = generator
        if self._original_generator is not None:
            setattr(torch_checkpoint, _GENERATOR, _run_generator)
        # on the class, which other packages import by its name
        setattr(torch_checkpoint.CheckpointFunction, "apply", staticmethod(_run_reentrant))  # noqa: B010

    def _remove(self) -> None:
        if getattr(torch_checkpoint, _GENERATOR, None) is _run_generator:
            setattr(torch_checkpoint, _GENERATOR, self._original_generator)
        attributes = torch_checkpoint.CheckpointFunction.__dict__
        if getattr(attributes.get("apply"), "__func__", None) is _run_reentrant:
            del torch_checkpoint.CheckpointFunction.apply

    def run_original_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Return torch's generator, for a thread outside of the context."""
        assert self._original_generator is not None
        return self._original_generator(*args, **kwargs)


_SWITCH = _Switch()
_GENERATOR = "_checkpoint_without_reentrant_generator"
"""torch's context around a segment with ``use_reentrant=False``: a generator with one stop."""


def _run_generator(
    function: Callable[..., Any],
    preserve_rng_state: bool = True,
    context_fn: Callable[[], Any] = torch_checkpoint.noop_context_fn,
    *args: Any,
    **kwargs: Any,
) -> Iterator[None]:
    """Surround a segment with ``use_reentrant=False`` by its own forward context only.

    Args:
        function: The segment, which the caller runs.
        preserve_rng_state: Whether a second run would draw the same random numbers.
        context_fn: Makes the contexts of the forward and of the second run.
        *args: Further options and the segment's arguments.
        **kwargs: The segment's arguments.
    """
    if not _SWITCH.is_on:
        original: Iterator[None] = _SWITCH.run_original_generator(
            function, preserve_rng_state, context_fn, *args, **kwargs
        )
        return original
    return _forward_context(context_fn)


def _forward_context(context_fn: Callable[[], Any]) -> Iterator[None]:
    with context_fn()[0]:
        yield


def _run_reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """Run a segment with ``use_reentrant=True``.

    Args:
        function: The segment.
        preserve_rng_state: Whether a second run would draw the same random numbers.
        *args: Its arguments.

    Returns:
        Its outputs. As in training, they have no graph where no argument requires a gradient.
    """
    checkpoint: Any = torch_checkpoint.CheckpointFunction
    if not _SWITCH.is_on:
        return super(checkpoint, checkpoint).apply(function, preserve_rng_state, *args)
    has_graph = any(isinstance(x, Tensor) and x.requires_grad for x in args)
    with torch.set_grad_enabled(torch.is_grad_enabled() and has_graph):
        out = function(*args)
    if has_graph:
        return out
    # the segment may have switched gradients on by itself
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out)
