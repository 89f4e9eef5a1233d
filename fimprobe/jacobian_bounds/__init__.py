"""Bounds on layer Jacobians from the weights: Soen & Sun (2021), eq. 20 and 21.

Starts at ``layer_bounds.py``; ``propagation.py`` walks the autograd graph down from the outputs.
"""
