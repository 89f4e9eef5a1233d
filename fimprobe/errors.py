"""Exceptions that fimprobe raises."""

from __future__ import annotations


class FimprobeError(Exception):
    """What fimprobe raises: the message names the argument, its value and the remedy."""


class BatchError(FimprobeError):
    """This batch cannot be probed (empty, non-finite outputs, ...); another one may."""
