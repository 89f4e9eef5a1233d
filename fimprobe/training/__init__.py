"""Observing a training loop: its batches, its loss, its steps, and when to measure."""
