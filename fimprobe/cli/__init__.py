"""The command line: ``fimprobe demo | check | show``."""

from fimprobe.cli.commands import main

__all__ = ["main"]
