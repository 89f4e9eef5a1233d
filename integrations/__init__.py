"""Adapters to training loops; each uses the public API only."""
