"""One spot check: an input, an entry, the weight of what is measured there, and its result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One spot check.

    Attributes:
        layer: The layer whose V2 it estimates.
        parameter: The parameter's name.
        row: Place of the input in the batch.
        entry: Index of the entry in the flattened parameter.
        weight: 1/(B π), where π is the probability of input and entry in one draw for the layer.
    """

    layer: str
    parameter: str
    row: int
    entry: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class CheckedEntry:
    """The result of one check.

    Attributes:
        slot: The check.
        value: Its estimate of V2 of the layer.
        difference: ρ, the size of the second difference over that of the outputs.
        eta: η of its step.
    """

    slot: Slot
    value: float
    difference: float
    eta: float
