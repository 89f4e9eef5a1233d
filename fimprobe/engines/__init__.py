"""Engines: from a model, a batch and draws to moments."""
