"""The command line."""

from fimprobe.cli.commands import main

__all__ = ["main"]
