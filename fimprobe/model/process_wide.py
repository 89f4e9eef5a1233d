"""Contexts that change settings of the whole process, which several threads may be in at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet


class ProcessWide:
    """A setting of torch that all threads share, changed while at least one thread needs it.

    If each thread restored what it saw at its beginning, the last one would restore the change of
    another one, and the user's process would keep it.

    Args:
        make_context: Returns the context that changes the setting and restores it.
    """

    def __init__(self, make_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make_context = make_context
        self._lock = threading.Lock()
        self._inside: WeakSet[_Inside] = WeakSet()
        self._context: AbstractContextManager[Any] | None = None

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Change the setting inside the context, and restore it if no other one is left."""
        inside = _Inside()
        try:
            self._enter(inside)
            yield
        finally:
            try:
                self._leave(inside)
            except BaseException:  # an interrupt on the way out, which comes once
                self._leave(inside)
                raise

    def _enter(self, inside: _Inside) -> None:
        with self._lock:
            self._inside.add(inside)
            if self._context is None:
                context = self._make_context()
                context.__enter__()
                self._context = context

    def _leave(self, inside: _Inside) -> None:
        with self._lock:
            self._inside.discard(inside)
            if not self._inside and self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)


class _Inside:
    """Stands for one context. It dies with its frame, also where an interrupt ends that early."""
