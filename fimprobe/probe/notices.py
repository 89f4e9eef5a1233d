"""Notices to the user that are no warnings: in the log, and in the terminal."""

from __future__ import annotations

import logging
import sys

from fimprobe.errors import logger


def announce(paragraph: str) -> None:
    """Log a paragraph, and write it to the terminal unless the log goes there."""
    logger.info("fimprobe: %s", paragraph)
    if not _logs_to_terminal(logger):
        print(f"fimprobe: {paragraph}", file=sys.stderr)


def _logs_to_terminal(log: logging.Logger | None) -> bool:
    """Return whether a handler of a logger or of its parents writes notices to the terminal."""
    enabled = logger.isEnabledFor(logging.INFO)
    while enabled and log is not None:
        for handler in log.handlers:
            stream = getattr(handler, "stream", None)
            if stream in (sys.stderr, sys.stdout) and handler.level <= logging.INFO:
                return True
        log = log.parent if log.propagate else None
    return False
