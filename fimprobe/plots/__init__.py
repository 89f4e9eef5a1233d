"""Figures of a run, from records; matplotlib is imported in ``style.py`` only."""
