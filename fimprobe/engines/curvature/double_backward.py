"""Cotangents with their graph, and their derivatives along directions."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.tracing.tape import Tape


def use_differentiable_attention() -> Any:
    """Attention's flash kernels have no second derivative; the plain one has."""
    return sdpa_kernel(SDPBackend.MATH)


class DoubleBackward:
    """The second-order pass over one chunk: holds δ with its graph, and yields Hv for directions."""

    def __init__(self, h: Tensor, tape: Tape, replayed: list[Tensor]) -> None:
        self.h, self.tape, self.replayed = h, tape, replayed
        self.places = [*tape.edges, *tape.sources, *replayed]
        self.first: list[list[Tensor | None]] = []
        self.edges, self.sources = len(tape.edges), len(tape.sources)

    def take(self, seeds: list[Tensor]) -> None:
        """Pull seeds back."""
        for seed in seeds:
            found: list[Tensor | None] = []
            if self.places:
                found = list(vjp([self.h], [seed], self.places, create_graph=True))
            self.first.append(found)

    def arrived(self, first: int, last: int | None = None) -> list[list[Tensor | None]]:
        """What arrived at edges and sources, of some seeds, detached."""
        places, seeds = self.edges + self.sources, self.first[first:last]
        return [[None if d is None else d.detach() for d in found[:places]] for found in seeds]

    def delta(self, seed: int) -> list[Tensor | None]:
        """δ at the edges, detached."""
        return [None if d is None else d.detach() for d in self.first[seed][: self.edges]]

    def bend(
        self,
        seed: int,
        at_edges: list[Tensor | None],
        at_parameters: list[Tensor | None] | None = None,
        inputs: bool = True,
        straight: bool = False,
    ) -> Curve:
        """Derivatives of δ at the edges, and of the sources' inputs, along a direction held fixed.

        s = ⟨direction, δ⟩; ∂s/∂z is δ's derivative (zero where ``straight``), ∂s/∂δ_x that of the
        input x.
        """
        first = self.first[seed]
        directions = [*at_edges, *[None] * self.sources, *(at_parameters or [])]
        pairs = [
            (d, v)
            for v, d in zip(directions, first, strict=False)
            if v is not None and d is not None and d.requires_grad
        ]
        middle = first[self.edges : self.edges + self.sources]
        wanted = [m for m in middle if m is not None and m.requires_grad] if inputs else []
        edges = [] if straight else self.tape.edges
        if not pairs or not (edges or wanted):
            return Curve([None] * self.edges, [None] * self.sources)
        found: list[Tensor | None] = list(
            vjp([d for d, _ in pairs], [v for _, v in pairs], [*edges, *wanted])
        )
        if straight:
            found = [*[None] * self.edges, *found]
        if not inputs:
            return Curve(found, [None] * self.sources)
        later = iter(found[self.edges :])
        moved = [next(later) if m is not None and m.requires_grad else None for m in middle]
        return Curve(found[: self.edges], moved)

    def release(self, seed: int, curve: Curve, live: list[Tensor | None]) -> Curve:
        """The same where the direction moves with the calls' inputs: ẑ(x; u), x a function of z.

        δ̇ gains ∂⟨ẑ(x; u), δ⟩/∂z with δ fixed, a first-order pass; the inputs move as before.
        """
        pairs = [
            (v, d.detach())
            for v, d in zip(live, self.first[seed], strict=False)
            if v is not None and v.requires_grad and d is not None
        ]
        if not pairs:
            return curve
        more = vjp([v for v, _ in pairs], [d for _, d in pairs], self.tape.edges)
        both: list[Tensor | None] = [
            b if a is None else (a if b is None else a + b)
            for a, b in zip(curve.edges, more, strict=True)
        ]
        return Curve(both, curve.inputs)


class Curve(NamedTuple):
    """What a direction does: δ's derivatives at the edges, and the inputs' at the sources."""

    edges: list[Tensor | None]
    inputs: list[Tensor | None]
