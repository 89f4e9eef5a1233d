"""Copies of the user's objects and modules, and what restores the originals."""
