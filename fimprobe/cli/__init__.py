"""The command line: ``fimprobe demo | check | show | estimate | audit``."""

from fimprobe.cli.commands import main

__all__ = ["main"]
