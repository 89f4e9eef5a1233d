"""The moments of all parameters for one kind of seeds, kept side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.primitives.device_transfer import to_device
from fimprobe.engines.problem.weights import GRAM_LIMIT, Weights
from fimprobe.statistics import Moments, subsample_entries

STACK_BYTES = 2**19
"""On a CPU small gradients are taken together in pieces below this: fresh pages are dear."""

Totals = tuple[Tensor, Tensor, Tensor, list[Tensor] | None]
"""Σ A2² of each name [n]; A4, Q, R and top [n, 4, B]; Gram matrices; entries of A2."""


@dataclass
class MomentAccumulators:
    """One accumulator for each name; their powers and Gram matrices are rows of shared tensors."""

    diagonals: bool
    sampled: bool
    """Whether some entries of A2 are wanted."""
    bare: bool
    """Whether A2 itself is not."""
    device: torch.device
    accumulators: dict[str, MomentAccumulator] = field(default_factory=dict)
    grams: list[Tensor] = field(default_factory=list)
    """For each chunk: [n, b, S, S], or squared norms [n, b, S]."""
    powers: list[Tensor] = field(default_factory=list)
    """For each chunk: A4, Q, R and top of each sample, float64 [n, 4, b]."""

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        diagonals: bool = False,
        sampled: bool = False,
        bare: bool = False,
        sharded: Collection[str] = (),
    ) -> MomentAccumulators:
        """A ledger for gradients of these tensors; ``sharded`` ones are opened when taken."""
        device = next(iter(tensors.values())).device
        made = cls(diagonals, sampled, bare, device)
        made.include(tensors, sharded)
        return made

    def include(self, tensors: Mapping[str, Tensor], sharded: Collection[str] = ()) -> None:
        """Add the names that are new."""
        for name, like in tensors.items():
            if name not in self.accumulators:
                self.accumulators[name] = MomentAccumulator.like(
                    like, diagonals=self.diagonals, sharded=name in sharded, bare=self.bare
                )

    def begin(self, samples: int, draws: int) -> None:
        """Make room for the powers and Gram matrices of the next chunk."""
        shape = (samples, draws, draws) if 1 < draws <= GRAM_LIMIT else (samples, draws)
        count = len(self.accumulators)
        gram = torch.zeros(count, *shape, dtype=torch.float64, device=self.device)
        powers = torch.zeros(count, 4, samples, dtype=torch.float64, device=self.device)
        self.grams.append(gram)
        self.powers.append(powers)
        rows = zip(self.accumulators.values(), gram.unbind(0), powers.unbind(0), strict=True)
        for accumulator, inner, sums in rows:
            accumulator.gram, accumulator.sums = inner, sums

    def add_small_parameters(
        self, names: Sequence[str], gradients: Sequence[Tensor], weights: Weights | None, room: float
    ) -> None:
        """Take gradients [B, S, P] of parameters of one shape, all at once and in float64."""
        size, draws = gradients[0].shape[:2]
        width = gradients[0].shape[2:].numel()
        room = min(room, STACK_BYTES) if gradients[0].device.type == "cpu" else room
        step = max(1, int(room / (8 * draws * width * len(names))))
        for start in range(0, size, step):
            samples = slice(start, min(start + step, size))
            g = torch.stack([x[samples] for x in gradients]).double()
            part = None if weights is None else weights.rows(samples)
            self._add_stack(names, g.view(len(names), -1, draws, width), samples, part)

    def _add_stack(
        self, names: Sequence[str], g: Tensor, samples: slice, weights: Weights | None
    ) -> None:
        """g [k, b, S, P] of k parameters."""
        index = {name: row for row, name in enumerate(self.accumulators)}
        rows = to_device(torch.tensor([index[name] for name in names]), g.device)
        gram = self.grams[-1]
        square = g.square()
        inner = square.sum(-1) if gram.dim() == 3 else g @ g.transpose(-1, -2)
        gram[rows, samples] += inner
        own: Tensor | None = None
        if weights is None or weights.second is None:
            blocks = [square.squeeze(2) if g.shape[2] == 1 else square.sum(2)]
            quartic = square.square()
            own = quartic.sum(2)
            if weights is not None:
                quartic = quartic * weights.fourth.double().unsqueeze(-1)
        else:
            second = weights.second.double().unsqueeze(1)
            blocks = [(second[..., p] @ square[:, :, p]).squeeze(2) for p in weights.parts()]
            quartic = square.square() * weights.fourth.double().unsqueeze(-1)
        f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        q = r = f.square()
        if own is not None:
            r = own
        elif len(blocks) > 1:
            r = torch.stack(blocks).square().sum(0)
        found = torch.stack([quartic.sum((2, 3)), q.sum(2), r.sum(2)], 1)
        powers = self.powers[-1]
        powers[rows, :3, samples] += found
        if own is None and len(blocks) == 1:
            powers[rows, 3, samples] += (f * square.amax(2)).sum(2)
        for name, a2 in zip(names, f.sum(1).unbind(0), strict=True):
            self.accumulators[name].take(a2)
        if self.diagonals:
            parts = zip(names, quartic.sum((1, 2)), q.sum(1), r.sum(1), strict=True)
            for name, a4, whole, rest in parts:
                self.accumulators[name].add_entry_sums(a4, whole, rest)

    def mix(self, mix: Tensor) -> None:
        """The chunk's Gram matrices become those of combinations [B, n, m] of its m seeds."""
        wide = mix.double()
        self.grams[-1] = wide @ self.grams[-1] @ wide.mT

    def totals(self) -> Totals:
        """Where they are; entries of A2 unless a parameter is sharded."""
        taken = self.accumulators.values()
        squares = torch.stack([a.square_norm() for a in taken])
        whole = self.sampled and all(a.own is None for a in taken)
        entries = [subsample_entries(a.a2) for a in taken] if whole else None
        powers = torch.cat([_padded(p, len(squares)) for p in self.powers], 2)
        grams = torch.cat([_padded(gram, len(squares)) for gram in self.grams], 1)
        return squares, powers, grams, entries

    def finish(
        self, totals: Totals, second: Tensor | None, without: Collection[str]
    ) -> dict[str, Moments]:
        """The moments; ``totals`` fetched, ``second`` [B, S] the exact passes' factors of g²."""
        squares, powers, grams, entries = totals
        norms = grams.diagonal(dim1=2, dim2=3) if grams.dim() == 4 else grams
        a2 = (norms if second is None else norms * second.double()).sum((1, 2))
        values = zip(squares.tolist(), a2.tolist(), powers, norms, grams, strict=True)
        rows = dict(zip(self.accumulators, values, strict=True))
        found = {}
        for i, (name, accumulator) in enumerate(self.accumulators.items()):
            if name in without:
                continue
            square, total, sums, norm, gram = rows[name]
            found[name] = Moments(
                accumulator.result(),
                total,
                square,
                sums,
                norm,
                gram if gram.dim() == 3 else None,
                accumulator.a4,
                accumulator.q,
                accumulator.r,
                None if entries is None else entries[i],
            )
        return found


def _padded(gram: Tensor, count: int) -> Tensor:
    """Zeros for names that came later."""
    if len(gram) == count:
        return gram
    return torch.cat([gram, gram.new_zeros(count - len(gram), *gram.shape[1:])])
