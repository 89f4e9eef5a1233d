"""Exceptions of fimprobe, and what a probe does with an error: it is raised, or logged once."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("fimprobe")


class FimprobeError(Exception):
    """The base class of fimprobe's errors: the message has the argument, its value and the remedy."""


class BatchError(FimprobeError):
    """This batch cannot be measured (empty, outputs not finite, ...); another one may."""


class ErrorHandler:
    """Treats errors as the option ``on_error`` requests, so that none of them stops a training.

    Args:
        raises: Whether errors are raised; otherwise each is logged once as a warning.
    """

    def __init__(self, *, raises: bool) -> None:
        self.raises = raises
        self.warned: set[str] = set()
        """What was logged already."""

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
                raise FimprobeError(f"{failure}: {error}") from error
            self.warn_once(f"{failure}: {error}", key)
            return False
        return True


def describe_error(error: Exception) -> str:
    """Return the message of an error, with its type unless fimprobe raised it.

    >>> describe_error(ValueError("no number")), describe_error(FimprobeError("pass one"))
    ('ValueError: no number', 'pass one')
    """
    return str(error) if isinstance(error, FimprobeError) else f"{type(error).__name__}: {error}"
