"""Contexts that change settings of the whole process, which several threads may be in at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet


class Inside:
    """Stands for one context. It dies with its frame, also where an interrupt ends that early."""


@contextmanager
def hold(enter: Callable[[Inside], None], leave: Callable[[Inside], None]) -> Iterator[None]:
    """Enter something that counts who is inside, and leave it however the context ends.

    Args:
        enter: Adds the context to those inside.
        leave: Removes it; twice does no harm.
    """
    inside = Inside()
    try:
        enter(inside)
        yield
    finally:
        try:
            leave(inside)
        except BaseException:  # an interrupt on the way out, which comes once
            leave(inside)
            raise


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
        self._inside: WeakSet[Inside] = WeakSet()
        self._context: AbstractContextManager[Any] | None = None

    def changed(self) -> AbstractContextManager[None]:
        """Change the setting inside the context, and restore it if no other one is left."""
        return hold(self._enter, self._leave)

    def _enter(self, inside: Inside) -> None:
        with self._lock:
            self._inside.add(inside)
            if self._context is None:
                context = self._make_context()
                context.__enter__()
                self._context = context

    def _leave(self, inside: Inside) -> None:
        with self._lock:
            self._inside.discard(inside)
            if not self._inside and self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)
