"""Sinks: the destinations of reports."""
