"""The moments of all parameters for one kind of seeds, kept side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.contract import Accumulator
from fimprobe.engines.fetch import upload
from fimprobe.engines.powers import GRAM_LIMIT, Weights
from fimprobe.sampling import spread
from fimprobe.types import Moments

STACK_BYTES = 2**19
"""On a CPU small gradients are taken together in pieces below this: fresh pages are dear."""

Totals = tuple[Tensor, Tensor, list[Tensor] | None]
"""A4, Q, R, top and Σ A2² of each name, float64 [n, 5]; Gram matrices; entries of A2."""


@dataclass
class Ledger:
    """One accumulator for each name; their sums and Gram matrices are rows of shared tensors."""

    diagonals: bool
    sampled: bool
    """Whether some entries of A2 are wanted."""
    bare: bool
    """Whether A2 itself is not."""
    sums: Tensor
    """A4, Q, R and the top sum of each name, float64 [n, 4]."""
    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    grams: list[Tensor] = field(default_factory=list)
    """For each chunk: [n, b, S, S], or squared norms [n, b, S]."""

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        diagonals: bool = False,
        sampled: bool = False,
        bare: bool = False,
        sharded: Collection[str] = (),
    ) -> Ledger:
        """A ledger for gradients of these tensors; ``sharded`` ones are opened when taken."""
        device = next(iter(tensors.values())).device
        made = cls(diagonals, sampled, bare, torch.zeros(0, 4, dtype=torch.float64, device=device))
        made.include(tensors, sharded)
        return made

    def include(self, tensors: Mapping[str, Tensor], sharded: Collection[str] = ()) -> None:
        """Add the names that are new."""
        new = {name: like for name, like in tensors.items() if name not in self.accumulators}
        if not new:
            return
        self.sums = torch.cat([self.sums, self.sums.new_zeros(len(new), 4)])
        rows = self.sums.unbind(0)
        for accumulator, row in zip(self.accumulators.values(), rows, strict=False):
            accumulator.sums = row
        for (name, like), row in zip(new.items(), rows[-len(new) :], strict=True):
            self.accumulators[name] = Accumulator.like(
                like, row, diagonals=self.diagonals, sharded=name in sharded, bare=self.bare
            )

    def begin(self, samples: int, draws: int) -> None:
        """Make room for the Gram matrices of the next chunk."""
        shape = (samples, draws, draws) if 1 < draws <= GRAM_LIMIT else (samples, draws)
        gram = torch.zeros(len(self.sums), *shape, dtype=torch.float64, device=self.sums.device)
        self.grams.append(gram)
        for accumulator, mine in zip(self.accumulators.values(), gram.unbind(0), strict=True):
            accumulator.gram = mine

    def add_vectors(
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
        rows = upload(torch.tensor([index[name] for name in names]), g.device)
        gram = self.grams[-1]
        square = g.square()
        inner = square.sum(-1) if gram.dim() == 3 else g @ g.transpose(-1, -2)
        gram[rows, samples] += inner
        if weights is None:
            blocks = [square.squeeze(2) if g.shape[2] == 1 else square.sum(2)]
            quartic = square.square()
        else:
            second = weights.second.double().unsqueeze(1)
            blocks = [(second[..., p] @ square[:, :, p]).squeeze(2) for p in weights.parts()]
            quartic = square.square() * weights.fourth.double().unsqueeze(-1)
        f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        q = r = f.square()
        if len(blocks) > 1:
            r = torch.stack(blocks).square().sum(0)
        found = torch.stack([quartic.sum((1, 2, 3)), q.sum((1, 2)), r.sum((1, 2))], 1)
        self.sums[rows, :3] += found
        if weights is not None and len(blocks) == 1:
            self.sums[rows, 3] += (f * square.amax(2)).sum((1, 2))
        for name, a2 in zip(names, f.sum(1).unbind(0), strict=True):
            self.accumulators[name].take(a2)
        if self.diagonals:
            parts = zip(names, quartic.sum((1, 2)), q.sum(1), r.sum(1), strict=True)
            for name, a4, own, rest in parts:
                self.accumulators[name].take_entries(a4, own, rest)

    def mix(self, mix: Tensor) -> None:
        """The chunk's Gram matrices become those of combinations [B, n, m] of its m seeds."""
        wide = mix.double()
        self.grams[-1] = wide @ self.grams[-1] @ wide.mT

    def totals(self) -> Totals:
        """Where they are; entries of A2 unless a parameter is sharded."""
        taken = self.accumulators.values()
        sums = torch.cat([self.sums, torch.stack([a.square_norm() for a in taken]).unsqueeze(1)], 1)
        whole = self.sampled and all(a.own is None for a in taken)
        entries = [spread(a.a2) for a in taken] if whole else None
        return sums, torch.cat([_padded(gram, len(sums)) for gram in self.grams], 1), entries

    def finish(
        self, totals: Totals, second: Tensor | None, without: Collection[str]
    ) -> dict[str, Moments]:
        """The moments; ``totals`` fetched, ``second`` [B, S] the exact passes' factors of g²."""
        sums, grams, entries = totals
        norms = grams.diagonal(dim1=2, dim2=3) if grams.dim() == 4 else grams
        a2 = (norms if second is None else norms * second.double()).sum((1, 2))
        told = torch.cat([sums, a2.unsqueeze(1)], 1).tolist()
        rows = dict(zip(self.accumulators, zip(told, norms, grams, strict=True), strict=True))
        found = {}
        for i, (name, accumulator) in enumerate(self.accumulators.items()):
            if name in without:
                continue
            (a4, q, r, top, square, total), norm, gram = rows[name]
            found[name] = Moments(
                accumulator.result(),
                total,
                square,
                a4,
                q,
                r,
                norm,
                top,
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
