"""The mean of several models' parameters, weighted by their F."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.fisher.decisions import check_shapes
from fimprobe.fisher.records import FisherRecord


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Merged parameters.

    Attributes:
        state: Σ_k F_k θ_k / Σ_k F_k by name, in the types of the first model.
        std_error: Standard error of each merged entry that has an F.
        rel_error: √(Σ error²) over the length of the move away from the plain average; None where
            there is no move.
    """

    state: dict[str, Tensor] = field(repr=False)
    std_error: dict[str, Tensor] = field(repr=False)
    rel_error: float | None


def merge(fishers: Sequence[FisherRecord], states: Sequence[Mapping[str, Tensor]]) -> Merged:
    """Return the merged parameters; see :meth:`Fisher.merge`.

    Args:
        fishers: F of each model.
        states: State dictionaries.

    Raises:
        FimprobeError: If the models differ in names or shapes, or states are in another order.
    """
    if len(fishers) < 2 or len(fishers) != len(states):
        raise FimprobeError(
            "`fishers` must hold at least two, with one state each, got "
            f"{len(fishers)} and {len(states)} states. Pass one Fisher for each model."
        )
    first = fishers[0]
    for fisher, state in zip(fishers, states, strict=True):
        check_shapes("fishers", fisher.diagonal, first.diagonal)
        check_shapes("states", state, first.diagonal)
    _check_order(fishers, states)
    merged, errors = {}, {}
    error_square = move_square = 0.0
    for name, x in states[0].items():
        if name not in first.diagonal:
            continue
        device = x.device
        theta = torch.stack([s[name].to(device, torch.float64) for s in states])
        weight = torch.stack([f.diagonal[name].to(device) for f in fishers])
        spread = torch.stack([f.std_error[name].to(device) for f in fishers])
        total = weight.sum(0)
        known = total > 0
        safe = total.where(known, 1)
        plain = theta.mean(0)
        value = torch.where(known, (weight * theta).sum(0) / safe, plain)
        error = (((theta - value) / safe).square() * spread.square()).sum(0).sqrt()
        error = torch.where(known, error, torch.inf)
        # a weighted mean stays in the range of the models, however uncertain the weights: its
        # standard deviation is at most half of that (Popoviciu's inequality)
        errors[name] = torch.minimum(error, (theta.amax(0) - theta.amin(0)) / 2)
        error_square += float(errors[name].square().sum())
        move_square += float((value - plain).square().sum())
        merged[name] = value.to(x.dtype)
    for name in states[0]:
        if name not in first.diagonal:
            tied = _tied_name(name, first.diagonal, states)
            parts = [state[name] for state in states]
            merged[name] = _average(parts) if tied is None else merged[tied].clone()
    rel_error = (error_square / move_square) ** 0.5 if move_square > 0 else None
    in_order = {name: merged[name] for name in states[0]}
    return Merged(state=in_order, std_error=errors, rel_error=rel_error)


def _check_order(fishers: Sequence[FisherRecord], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that no state is that of another model's Fisher.

    Raises:
        FimprobeError: If one is.
    """
    fits = [[_is_measured(fisher, state) for state in states] for fisher in fishers]
    for number, row in enumerate(fits):
        others = [k for k, fit in enumerate(row) if fit and not fits[k][k]]
        if others and not row[number]:
            raise FimprobeError(
                f"`states` must be in the order of `fishers`, but Fisher {number} was measured at "
                f"state {others[0]}. Pass them in one order."
            )


def _is_measured(fisher: FisherRecord, state: Mapping[str, Tensor]) -> bool:
    """Whether a state holds the parameters at which F was measured."""
    return all(torch.equal(x.cpu(), state[name].detach().cpu()) for name, x in fisher.values.items())


def _tied_name(
    name: str, measured: Iterable[str], states: Sequence[Mapping[str, Tensor]]
) -> str | None:
    """The measured parameter that an entry equals in every model: a tied one has two names."""
    for other in measured:
        pairs = [(state[name], state[other]) for state in states]
        if all(x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs):
            return other
    return None


def _average(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of entries without an F; the first model's where they are integers."""
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    return torch.stack([x.to(tensors[0].device) for x in tensors]).mean(0)
