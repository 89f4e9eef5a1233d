"""Shifts of one entry for each row of a batch, added to the outputs of the layers that use it.

A layer's output is affine in its parameters. Adding s ∂z/∂θ_e to the output z of one row is therefore
the same as shifting the entry e by s for that row alone. The derivative is computed from the input of
the call as it is in the shifted pass, so that a parameter that is used again sees its own effect.

Symbols: n rows of the pass, k of them with an entry of the parameter, z the layer's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.layers.rules import GradientRule
from fimprobe.engines.spot_checks.held_kinks import HeldKinks
from fimprobe.engines.spot_checks.slots import Slot

SMALL_CHANGE = 0.002
"""Relative change of the outputs in which a difference is a derivative, within its tolerance."""


@dataclass(kw_only=True)
class Steps:
    """The steps s of one pass, decided in the first of its forward passes.

    Attributes:
        eta: Size of the shift over that of z [n], float64 on the device.
        values: s [n]; zero while a row's entry has had no effect yet.
        deciding: Whether steps are still decided.
        sign: Factor of the shift: 1, −1, or 0 for the unshifted pass.
        kinks: Records the branches of the pass; it is paused where steps are decided.
        groups: The entries of each parameter, which all forward passes share.
        differentiable: Rows whose shifts were added to an output, of which autograd knows.
        evaluated: Rows for which a module was evaluated again.
    """

    eta: Tensor
    values: Tensor
    deciding: bool = True
    sign: float = 1.0
    kinks: HeldKinks | None = None
    groups: dict[str, EntryGroup] = field(default_factory=dict)
    differentiable: set[int] = field(default_factory=set)
    evaluated: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, eta: Sequence[float], device: torch.device, kinks: HeldKinks | None) -> Steps:
        """Steps that are not decided yet.

        Args:
            eta: For each row.
            device: The device of the computation.
            kinks: Records the branches of the pass; None without kinks.
        """
        eta_tensor = torch.tensor(eta, dtype=torch.float64, device=device)
        return cls(eta=eta_tensor, values=torch.zeros_like(eta_tensor), kinks=kinks)

    def shrunk(self, outputs: Tensor, change: Tensor) -> Steps:
        """The same steps, but so small that no output changes by more than ``SMALL_CHANGE``.

        Args:
            outputs: h [n, ...].
            change: That of h by these steps.
        """
        sizes = [x.flatten(1).double().norm(dim=1) for x in (outputs, change)]
        factor = (SMALL_CHANGE * sizes[0] / sizes[1].clamp(min=1e-300)).clamp(max=1.0)
        return Steps(
            eta=self.eta,
            values=self.values * factor,
            deciding=False,
            kinks=self.kinks,
            groups=self.groups,
        )

    def undecided(self, row: int) -> bool:
        """Whether the step of a row is to be decided."""
        with self.paused():
            return self.deciding and float(self.values[row]) == 0

    def paused(self) -> AbstractContextManager[None]:
        """No branches are recorded inside the context."""
        return contextlib.nullcontext() if self.kinks is None else self.kinks.paused()

    def decide(self, rows: Tensor, output_size: Tensor, derivative_size: Tensor) -> None:
        """Decide the steps of rows that have none, where the derivative is not zero.

        Args:
            rows: Places in the pass [k].
            output_size: Root mean square of z [k].
            derivative_size: That of ∂z/∂θ_e [k].
        """
        if not self.deciding:
            return
        with self.paused(), torch.no_grad():
            before, size = self.values[rows], derivative_size.double()
            scale = output_size.double().clamp(min=1e-12)
            is_undecided = (before == 0).logical_and_(size > 0)
            self.values[rows] = torch.where(is_undecided, self.eta[rows] * scale / size, before)

    def shift(self, rows: Tensor, like: Tensor) -> Tensor:
        """The signed steps of some rows [k], in the type of ``like``."""
        return (self.sign * self.values[rows]).to(like.dtype)


@dataclass(kw_only=True)
class EntryGroup:
    """Entries of one parameter, each for a row of its own.

    Attributes:
        rows: Places in the pass [k].
        entries: Index of each entry in the flattened parameter.
        shape: Shape of the parameter.
    """

    rows: list[int]
    entries: list[int]
    shape: torch.Size
    _cache: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: Sequence[tuple[int, Slot]], shape: torch.Size) -> EntryGroup:
        """The entries of some checks, each with its place in the pass.

        Args:
            slots: Places and checks.
            shape: Shape of their parameter.
        """
        return cls(
            rows=[row for row, _ in slots], entries=[slot.entry for _, slot in slots], shape=shape
        )

    def places(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, first and second index of the entries [k]; 0 where there is one index only."""
        key = str(device)
        if key not in self._cache:
            width = self.shape[-1] if len(self.shape) > 1 else 1
            indices = [divmod(entry, width) for entry in self.entries]
            places = [self.rows, [i for i, _ in indices], [j for _, j in indices]]
            self._cache[key] = torch.tensor(places).to(device).unbind()  # type: ignore[assignment]
        return self._cache[key]

    def slice(self, rows: slice | None) -> EntryGroup:
        """The entries within some leading rows of a packed parameter, counted from their start."""
        if rows is None:
            return self
        width = self.shape[1:].numel()
        inside = [
            (r, e - rows.start * width)
            for r, e in zip(self.rows, self.entries, strict=True)
            if rows.start <= e // width < rows.stop
        ]
        shape = torch.Size([rows.stop - rows.start, *self.shape[1:]])
        return EntryGroup(rows=[r for r, _ in inside], entries=[e for _, e in inside], shape=shape)


def is_direct(rule: GradientRule, shape: torch.Size) -> bool:
    """Whether :func:`add_shift` knows the derivative of the output, without calling the layer.

    Args:
        rule: The parameter's rule.
        shape: The parameter's shape.
    """
    return rule.outer or rule.lookup or (rule.additive == "last" and len(shape) == 1)


def add_shift(
    out: Tensor,
    x: Tensor,
    rule: GradientRule,
    group: EntryGroup,
    steps: Steps,
    *,
    padding: int | None = None,
) -> None:
    """Add the shifts to the output of a layer, in place.

    Args:
        out: z, batch first [n, ..., O].
        x: The layer's input, batch first: [n, ..., I], for a lookup the index [n, ...].
        rule: The parameter's rule; a bias along the last dimension, a weight or a lookup.
        group: The entries.
        steps: The steps.
        padding: The token of a lookup whose row is constant.
    """
    if not group.rows:
        return
    rows, first, second = group.places(out.device)
    derivative: Tensor | None = None
    if rule.additive == "last":
        units = first
    elif rule.lookup:
        tokens, units = x[rows], second
        used = tokens == first.view(-1, *[1] * (tokens.dim() - 1))
        derivative = (used if padding is None else used & (tokens != padding)).to(out.dtype)
    else:
        units, columns = (first, second) if rule.row_separable else (second, first)
        derivative = x[rows, ..., columns]  # [k, ...]
    if steps.deciding:
        size = out[rows].flatten(1).square().mean(1).sqrt()
        slope = torch.ones_like(size)
        if derivative is not None:
            slope = derivative.reshape(len(rows), -1).square().mean(1).sqrt()
        steps.decide(rows, size, slope)
    if steps.sign == 0:
        return
    steps.differentiable.update(group.rows)
    shift = steps.shift(rows, out)
    at_units = out[rows, ..., units]  # [k, ...]
    shift = shift.view(-1, *[1] * (at_units.dim() - 1))
    out[rows, ..., units] = at_units + (shift if derivative is None else shift * derivative)
