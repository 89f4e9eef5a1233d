"""Faults made on purpose: ``python -m tests.faults`` makes all of them and prints a table."""
