"""Bounds on layer Jacobians from the weights: Soen & Sun (2021), eq. 20 and 21.

The entry is ``layer_bounds.py``; ``propagation.py`` visits the autograd graph from the outputs down.
"""
