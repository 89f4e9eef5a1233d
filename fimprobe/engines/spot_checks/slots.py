"""Spot checks: an input, an entry, the weight of what is measured there, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fimprobe.engines.spot_checks.proposals import LayerProposal
from fimprobe.statistics import SpotStratum


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


def make_strata(
    layers: Mapping[str, LayerProposal],
    pilot: Mapping[str, list[CheckedEntry]],
    main: Mapping[str, list[CheckedEntry]],
    rounding_share: Callable[[float], float],
) -> list[SpotStratum]:
    """Return the results of all checks by layer.

    Args:
        layers: What entries were drawn from.
        pilot: Results of the first checks of each layer.
        main: Results of the others.
        rounding_share: From ρ to the share of rounding in a value.
    """
    of_layers = [[*pilot.get(layer, []), *main.get(layer, [])] for layer in layers]
    flat = [(v.value, rounding_share(v.difference)) for checked in of_layers for v in checked]
    numbers = torch.tensor(flat, dtype=torch.float64).view(-1, 2)
    parts = numbers.split([len(checked) for checked in of_layers])
    strata = []
    for (layer, proposal), checked, part in zip(layers.items(), of_layers, parts, strict=True):
        names = list(proposal.parameters)
        values, rounding = part.unbind(1)
        strata.append(
            SpotStratum(
                layer=layer,
                kind=proposal.kind,
                parameters=names,
                owners=torch.tensor([names.index(v.slot.parameter) for v in checked]),
                values=values,
                rounding=rounding,
                pilot=len(pilot.get(layer, [])),
            )
        )
    return strata
