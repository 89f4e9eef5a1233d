"""Runs read back: records, the terminal, one HTML page."""
