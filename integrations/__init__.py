"""Adapters to Trainers, which use the public API only."""
