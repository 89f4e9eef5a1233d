"""What checks teach about later ones: where V2 is, and how a layer's parameters share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fimprobe.engines.spot_checks.allocation import PILOT, learned_shares
from fimprobe.engines.spot_checks.proposals import LayerProposal
from fimprobe.engines.spot_checks.slots import CheckedEntry
from fimprobe.engines.tracing.spot_history import SpotHistory

HISTORY_CHECKS = 8.0
"""Number of checks for which V2 from earlier measurements counts."""


def share_by_kind(layers: Mapping[str, LayerProposal], pilot: SpotHistory) -> None:
    """Learn from the pilot how V2 is shared by the parameters of all layers of a kind.

    Args:
        layers: The proposals; their probabilities of parameters are changed.
        pilot: What the pilot has shown.
    """
    shares: dict[str, dict[str, float]] = {}
    for proposal in layers.values():
        whole = sum(pilot.values[name] for name in proposal.parameters)
        for name in proposal.parameters:
            share = pilot.values[name] / whole if whole > 0 else 0.0
            of_kind = shares.setdefault(proposal.kind, {})
            of_kind[_local(name)] = of_kind.get(_local(name), 0.0) + share
    for proposal in layers.values():
        of_kind = shares[proposal.kind]
        shared = {name: of_kind[_local(name)] for name in proposal.parameters}
        num_checks = PILOT * sum(of_kind.values())
        proposal.parameters = learned_shares(proposal.parameters, shared, num_checks)


def share_by_layer(layers: Mapping[str, LayerProposal], history: SpotHistory) -> None:
    """Share checks by the parameters of each layer as earlier measurements have shown.

    Args:
        layers: The proposals; their probabilities of parameters are changed.
        history: What they have shown.
    """
    for proposal in layers.values():
        proposal.parameters = learned_shares(proposal.parameters, history.values, HISTORY_CHECKS)


def note_checks(
    history: SpotHistory,
    layers: Mapping[str, LayerProposal],
    checks: Mapping[str, Sequence[CheckedEntry]],
) -> None:
    """Add the values of checks to a history.

    Args:
        history: Receives them.
        layers: The proposal of each layer.
        checks: The checks of each layer.
    """
    for layer, proposal in layers.items():
        of_layer = checks[layer]
        sums = dict.fromkeys(proposal.parameters, 0.0)
        for check in of_layer:
            sums[check.slot.parameter] += check.value / len(of_layer)
        history.note_values(sums)
        history.note_spread(proposal.kind, [check.value for check in of_layer])


def _local(name: str) -> str:
    return name.rpartition(".")[2]
