"""The version of fimprobe."""

__version__ = "0.1.0"
