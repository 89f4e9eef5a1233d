"""Exceptions of fimprobe, and what a probe does with an error: it is raised, or logged once."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("fimprobe")


class FimprobeError(Exception):
    """The base class of fimprobe's errors: the message has the argument, its value and the remedy."""


class BatchError(FimprobeError):
    """This batch cannot be measured (empty, outputs not finite, ...); another one may."""


class CoupledSamplesError(FimprobeError):
    """The outputs of a sample depend on which others are in the batch."""


class ErrorHandler:
    """Treats errors as the option ``on_error`` requests, so that none of them stops a training.

    Args:
        raises: Whether errors are raised; otherwise each is logged once as a warning.

    Attributes:
        warned: What was logged already.
        ended: Whether probing ended with an error, which was logged.
        end_reason: Why; "" if it did not end.
        deferred: The first error of a hook, which the next step treats.
        together: Whether several processes measure together, so that none may end alone.
    """

    def __init__(self, *, raises: bool) -> None:
        self.raises = raises
        self.warned: set[str] = set()
        self.ended = False
        self.end_reason = ""
        self.deferred: Exception | None = None
        self.together = False

    def end(self, message: str) -> None:
        """Log why nothing is measured any more; later reasons are consequences and not logged."""
        if not self.ended:
            self.warn_once(message)
            self.ended, self.end_reason = True, message

    def take_deferred(self) -> Exception | None:
        """Return the deferred error, and forget it."""
        error, self.deferred = self.deferred, None
        return error

    def warn_once(self, message: str, key: str | None = None) -> None:
        """Log a warning.

        Args:
            message: The warning.
            key: Warnings with one key are logged once; by default the message itself.
        """
        key = key or message
        if key not in self.warned:
            self.warned.add(key)
            logger.warning("fimprobe: %s", message)

    def run_safely(
        self, action: Callable[[], object], failure: str, *, key: str | None = None
    ) -> bool:
        """Run ``action`` and return whether it succeeded.

        Args:
            action: Called without arguments.
            failure: What an error means, the beginning of the message.
            key: As in :meth:`warn_once`.

        Raises:
            FimprobeError: If it fails and errors are to be raised.
        """
        try:
            action()
        except Exception as error:
            if self.raises:
                raise FimprobeError(f"{failure}: {describe_error(error)}") from error
            self.warn_once(f"{failure}: {describe_error(error)}", key)
            return False
        return True


def guarded(
    *, defers: bool = True, raises_mistakes: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a method that a hook, a callback or a loop enters: no error reaches the training.

    The object has the :class:`ErrorHandler` as its attribute ``errors``. The method does nothing
    inside of a graph that ``torch.compile`` or an export makes.

    Args:
        defers: Whether the next step treats an error. Otherwise it is raised if errors are to be
            raised, or ends probing at once; with several processes the next step treats it in all.
        raises_mistakes: Whether a FimprobeError is raised in any case, as where a training begins and
            arguments are checked.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call_guarded(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return None
            try:
                return method(owner, *args, **kwargs)
            except Exception as error:
                # nothing that may have failed itself is called here
                errors = owner.errors
                if errors.raises and not defers:
                    raise
                if raises_mistakes and isinstance(error, FimprobeError):
                    raise
                if defers or errors.together:
                    errors.deferred = errors.deferred or error
                elif not errors.ended:
                    errors.ended = True
                    with contextlib.suppress(Exception):
                        errors.end_reason = (
                            f"probing ended, training continues: {type(error).__name__}: {error}"
                        )
                        logger.warning("fimprobe: %s", errors.end_reason)
                return None

        return call_guarded

    return decorate


def describe_error(error: Exception) -> str:
    """Return the message of an error, with its type unless fimprobe or the file system raised it.

    >>> describe_error(ValueError("no number")), describe_error(FimprobeError("pass one"))
    ('ValueError: no number', 'pass one')
    >>> describe_error(OSError("disk full")), describe_error(MemoryError())
    ('disk full', 'MemoryError')
    """
    message = str(error)
    if isinstance(error, (FimprobeError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
