"""Î₂'s label variance from single entries, by differences of forward passes."""
