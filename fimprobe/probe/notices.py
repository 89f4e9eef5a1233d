"""Notices to the user that are no warnings: in the log, and in the terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fimprobe.errors import ErrorHandler, logger


def announce(paragraph: str) -> None:
    """Log a paragraph, and write it to the terminal unless the log goes there."""
    logger.info("fimprobe: %s", paragraph)
    if not _logs_to_terminal(logger):
        print(f"fimprobe: {paragraph}", file=sys.stderr)


def print_command(folder: Path, errors: ErrorHandler, note: str = "") -> None:
    """Print how to open the charts of a folder, in characters that standard output has.

    Args:
        folder: The folder.
        errors: Treats the errors of standard output.
        note: What follows the command.
    """

    def write() -> None:
        line = f"fimprobe: tensorboard --logdir {folder}{note}"
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding))

    errors.run_safely(write, "log_dir could not be printed")


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
