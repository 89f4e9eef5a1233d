"""Moments of all parameters for one kind of cotangents, with shared storage for per-sample sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.moments.power_sums import coincidence_sums, square_norms
from fimprobe.engines.primitives.device_transfer import to_device
from fimprobe.engines.problem.weights import GRAM_LIMIT, PassWeights
from fimprobe.statistics import Moments, subsample_entries

STACK_BYTES = 2**19
"""Maximum size of a stack of small per-sample gradients on a CPU.

Larger stacks are slower, because newly allocated pages must be faulted in (measured on a CPU).
"""

Totals = tuple[Tensor, Tensor, Tensor, list[Tensor] | None]
"""Σ A2² of each parameter [n]; A4, Q, R and top [n, 4, B]; Gram matrices; entries of A2."""


@dataclass(kw_only=True)
class MomentAccumulators:
    """One accumulator for each parameter.

    Their per-sample powers and Gram matrices are rows of shared tensors, so that the host fetches
    all of them at once.
    """

    diagonals: bool
    with_entries: bool
    """Whether some entries of A2 are returned."""
    sums_only: bool
    """Whether A2 is not kept."""
    device: torch.device
    accumulators: dict[str, MomentAccumulator] = field(default_factory=dict)
    grams: list[Tensor] = field(default_factory=list)
    """For each chunk: [n, b, S, S], or squared norms [n, b, S], float64."""
    powers: list[Tensor] = field(default_factory=list)
    """For each chunk: A4, Q, R and top of each sample, float64 [n, 4, b]."""

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        diagonals: bool = False,
        with_entries: bool = False,
        sums_only: bool = False,
        sharded: Collection[str] = (),
    ) -> MomentAccumulators:
        """Empty accumulators for gradients of some tensors.

        Args:
            tensors: A tensor of each parameter's shape, type and device, by name.
            diagonals: Whether A4, Q and R are kept for every entry.
            with_entries: Whether some entries of A2 are returned.
            sums_only: Whether A2 is not kept.
            sharded: Names of the parameters whose A2 is allocated in
                :meth:`MomentAccumulator.sharded_sums` only.
        """
        device = next(iter(tensors.values())).device
        accumulators = cls(
            diagonals=diagonals, with_entries=with_entries, sums_only=sums_only, device=device
        )
        accumulators.include(tensors, sharded)
        return accumulators

    def include(self, tensors: Mapping[str, Tensor], sharded: Collection[str] = ()) -> None:
        """Add an accumulator for every name that has none yet.

        Args:
            tensors: A tensor of each parameter's shape, type and device, by name.
            sharded: Names of the parameters whose A2 is allocated in
                :meth:`MomentAccumulator.sharded_sums` only.
        """
        for name, like in tensors.items():
            if name not in self.accumulators:
                self.accumulators[name] = MomentAccumulator.like(
                    like,
                    diagonals=self.diagonals,
                    sharded=name in sharded,
                    sums_only=self.sums_only,
                )

    def start_chunk(self, samples: int, draws: int) -> None:
        """Allocate the powers and Gram matrices of the next chunk of samples.

        Args:
            samples: b.
            draws: S. For 1 < S ≤ ``GRAM_LIMIT`` inner products [b, S, S] are kept for each parameter,
                else squared norms [b, S].
        """
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
        self,
        names: Sequence[str],
        gradients: Sequence[Tensor],
        weights: PassWeights | None,
        room: float,
    ) -> None:
        """Add the gradients of small parameters of one shape, all at once and in float64.

        One stack takes a handful of operations, whatever the number of parameters. In float64 no
        scale is needed.

        Args:
            names: The parameters.
            gradients: Per-sample gradients [B, S, P] of each.
            weights: Weights of the chunk's passes.
            room: Maximum size of a stack in bytes.
        """
        size, draws = gradients[0].shape[:2]
        width = gradients[0].shape[2:].numel()
        room = min(room, STACK_BYTES) if gradients[0].device.type == "cpu" else room
        step = max(1, int(room / (8 * draws * width * len(names))))
        for start in range(0, size, step):
            samples = slice(start, min(start + step, size))
            whole = step >= size
            g = torch.stack(list(gradients) if whole else [x[samples] for x in gradients]).double()
            sample_weights = None if weights is None else weights.rows(samples)
            self._add_stack(names, g.view(len(names), -1, draws, width), samples, sample_weights)

    def _add_stack(
        self, names: Sequence[str], g: Tensor, samples: slice, weights: PassWeights | None
    ) -> None:
        """Add gradients [k, b, S, P] of k parameters and b samples."""
        index = {name: row for row, name in enumerate(self.accumulators)}
        rows = to_device(torch.tensor([index[name] for name in names]), g.device)
        gram = self.grams[-1]
        square = g.square()
        inner = square.sum(-1) if gram.dim() == 3 else g @ g.transpose(-1, -2)
        gram[rows, samples] += inner
        unweighted_quartic: Tensor | None = None
        if weights is None or weights.square is None:
            blocks = [square.squeeze(2) if g.shape[2] == 1 else square.sum(2)]
            quartic = square.square()
            unweighted_quartic = quartic.sum(2)
            if weights is not None and weights.coincidences is not None:
                self.powers[-1][rows, 3, samples] += coincidence_sums(quartic.sum(3), weights)
            if weights is not None:
                quartic = quartic * weights.quartic.double().unsqueeze(-1)
        else:
            factors = weights.square.double().unsqueeze(1)
            blocks = [(factors[..., p] @ square[:, :, p]).squeeze(2) for p in weights.block_slices()]
            quartic = square.square() * weights.quartic.double().unsqueeze(-1)
        f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
        q = r = f.square()
        if unweighted_quartic is not None:
            r = unweighted_quartic  # each draw is a block of its own
        elif len(blocks) > 1:
            r = torch.stack(blocks).square().sum(0)
        powers = self.powers[-1]
        powers[rows, :3, samples] += torch.stack([quartic.sum((2, 3)), q.sum(2), r.sum(2)], 1)
        if unweighted_quartic is None and len(blocks) == 1:
            powers[rows, 3, samples] += (f * square.amax(2)).sum(2)
        sums = f.sum(1).to(self.accumulators[names[0]].a2.dtype)
        for name, a2 in zip(names, sums.unbind(0), strict=True):
            self.accumulators[name].add_squares(a2)
        if self.diagonals:
            entries = zip(names, quartic.sum((1, 2)), q.sum(1), r.sum(1), strict=True)
            for name, a4_entries, q_entries, r_entries in entries:
                self.accumulators[name].add_entry_sums(a4_entries, q_entries, r_entries)

    def combine_cotangents(self, combinations: Tensor) -> None:
        """Replace the chunk's Gram matrices by those of linear combinations of its cotangents.

        Args:
            combinations: Coefficients [B, n, m] of n combinations of the chunk's m cotangents.
        """
        coefficients = combinations.double()
        self.grams[-1] = coefficients @ self.grams[-1] @ coefficients.mT

    def totals(self) -> Totals:
        """All sums, still on the device; entries of A2 unless a parameter is sharded."""
        accumulators = self.accumulators.values()
        if self.sums_only:
            squares = torch.zeros(len(accumulators), dtype=torch.float64, device=self.device)
        else:
            squares = square_norms([a.squared() for a in accumulators])
        has_entries = self.with_entries and all(a.local_shard is None for a in accumulators)
        entries = [subsample_entries(a.a2) for a in accumulators] if has_entries else None
        powers = torch.cat([_padded(p, len(squares)) for p in self.powers], 2)
        grams = torch.cat([_padded(gram, len(squares)) for gram in self.grams], 1)
        return squares, powers, grams, entries

    def finish(
        self, totals: Totals, square_weights: Tensor | None, exclude: Collection[str]
    ) -> dict[str, Moments]:
        """The moments of every parameter.

        Args:
            totals: What :meth:`totals` returned, on the host.
            square_weights: Weights of g² [B, S] of exact passes; None for drawn labels.
            exclude: Names to leave out.
        """
        squares, powers, grams, entries = totals
        norms = grams.diagonal(dim1=2, dim2=3) if grams.dim() == 4 else grams
        weighted = norms if square_weights is None else norms * square_weights.double()
        a2_sums = weighted.sum((1, 2)).tolist()
        a2_squares = squares.tolist()
        rows = zip(
            powers.unbind(0),
            norms.unbind(0),
            grams.unbind(0) if grams.dim() == 4 else [None] * len(norms),
            strict=True,
        )
        moments = {}
        pairs = zip(self.accumulators.items(), rows, strict=True)
        for i, ((name, accumulator), (own_powers, own_norms, gram)) in enumerate(pairs):
            if name in exclude:
                continue
            moments[name] = Moments(
                a2=accumulator.result(),
                a2_sum=a2_sums[i],
                a2_square=a2_squares[i],
                powers=own_powers,
                squared_norms=own_norms,
                gram=gram,
                a4=accumulator.a4,
                q=accumulator.q,
                r=accumulator.r,
                entries=None if entries is None else entries[i],
            )
        return moments


def _padded(rows: Tensor, count: int) -> Tensor:
    """``rows`` [n, ...] with zeros for the parameters that a later chunk added, [count, ...]."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
