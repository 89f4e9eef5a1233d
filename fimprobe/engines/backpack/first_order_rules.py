"""First-order BackPACK extension: A2, A4, Q, R and Gram matrices of all draws in one backward.

The chunk's n samples are repeated S times along the batch, the draws outermost; from the layers'
per-sample gradients g [S, n, *parameter] each parameter's sums are taken at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from backpack.extensions.firstorder.base import (
    FirstOrderBackpropExtension,
    FirstOrderModuleExtension,
)
from torch import Tensor, nn

from fimprobe.engines.backpack.derivatives import LAYERS
from fimprobe.engines.problem.weights import GRAM_LIMIT, Weights
from fimprobe.errors import FimprobeError
from fimprobe.statistics import Moments, subsample_entries


@dataclass
class ParameterSums:
    """One parameter's sums over some samples, in float64; per entry where asked for.

    ``powers`` [4, B] (A4, Q and R of each sample; no maxima here) and ``gram`` [B, S, S], or squared
    norms [B, S], have a place for each sample of the whole batch, zero for those not met. ``total``
    is Σ g, for the guard.
    """

    a2: Tensor
    powers: Tensor
    gram: Tensor
    total: Tensor
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None

    def __add__(self, other: ParameterSums) -> ParameterSums:
        """The sums over both; they have no sample in common."""
        both: dict[str, Any] = {
            name: None if mine is None else mine + getattr(other, name)
            for name, mine in self.__dict__.items()
        }
        return ParameterSums(**both)

    @property
    def squared_norms(self) -> Tensor:
        """‖g_bs‖² [B, S]."""
        return self.gram.diagonal(dim1=1, dim2=2) if self.gram.dim() == 3 else self.gram

    def finish(self, parameter: Tensor) -> Moments:
        """The moments; a2 in the parameter's precision."""
        a2 = self.a2.to(torch.promote_types(parameter.dtype, torch.float32))
        return Moments(
            a2=a2,
            a2_sum=float(self.a2.sum()),
            a2_square=float(self.a2.square().sum()),
            powers=self.powers,
            squared_norms=self.squared_norms,
            gram=self.gram if self.gram.dim() == 3 else None,
            a4=self.a4,
            q=self.q,
            r=self.r,
            entries=subsample_entries(a2),
        )


@dataclass
class ChunkContext:
    """What the extension needs to know about a chunk, and what it found: id(parameter) -> sums.

    ``rows`` of a batch of ``size``, each repeated for S ``draws``; per-sample gradients take up to
    ``limit`` bytes at once; ``weights`` and ``seen`` of the labels' seeds.
    """

    rows: slice
    size: int
    draws: int
    diagonals: bool
    limit: float
    weights: Weights | None = None
    seen: Tensor | None = None
    found: dict[int, ParameterSums] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples n of the chunk."""
        return self.rows.stop - self.rows.start


class MomentsExtension(FirstOrderBackpropExtension):
    """Fills ``job.found`` during one backward."""

    def __init__(self, job: ChunkContext) -> None:
        rules = {kind: _LayerMoments(*entry) for kind, entry in LAYERS.items()}
        super().__init__("fimprobe_moments", rules, fail_mode="ERROR")
        self.job = job
        self.done: set[int] = set()

    def __call__(self, module: Any, g_inp: Any, g_out: Any) -> None:
        """Take one module, once: BackPACK has the inputs and outputs of its last call only."""
        copies = self.job.samples * self.job.draws
        first = {t.shape[0] for t in (g_out[0], getattr(module, "input0", g_out[0]))}
        if id(module) in self.done or first != {copies}:
            raise FimprobeError(
                f"{type(module).__name__} was called more than once, or on something else than the "
                f"{copies} samples, unlike in the first look at the model; pass engine='autograd'"
            )
        self.done.add(id(module))
        super().__call__(module, g_inp, g_out)


class _LayerMoments(FirstOrderModuleExtension):
    """A layer's moments, from BackPACK's per-sample products with its parameters' Jacobians."""

    def __init__(self, derivatives: Any, params: tuple[str, ...]) -> None:
        self.derivatives = derivatives
        for name in params:
            setattr(self, name, partial(self._moments, name))
        super().__init__(params=list(params))

    def _moments(self, name, ext, module, g_inp, g_out, backproped):
        job: ChunkContext = ext.job
        parameter, delta, x = getattr(module, name), g_out[0].detach(), module.input0.detach()
        if type(module) is nn.Linear and name == "weight" and x.dim() == 2:
            sums = _outer_moments(job, delta, x)
        else:
            sums = reduce(add, self._pieces(job, parameter, name, module, g_inp, g_out))
        job.found[id(parameter)] = sums

    def _pieces(self, job, parameter, name, module, g_inp, g_out) -> Iterator[ParameterSums]:
        """Sums over as many samples at a time as fit."""
        delta = g_out[0].detach()
        step = max(1, int(job.limit / (job.draws * parameter.numel() * 8 * 8)))
        draws = torch.arange(job.draws, device=delta.device)[:, None] * job.samples
        for start in range(0, job.samples, step):
            part = slice(start, min(start + step, job.samples))
            inside = torch.arange(part.start, part.stop, device=delta.device)
            index = (draws + inside).flatten()
            g = self.derivatives.param_mjp(
                name, module, g_inp, g_out, delta[index], sum_batch=False, subsampling=index
            )
            yield _dense_moments(job, g.reshape(job.draws, len(inside), *parameter.shape), part)


def _dense_moments(job: ChunkContext, g: Tensor, part: slice) -> ParameterSums:
    """From per-sample gradients [S, n, *shape] of a part of the chunk."""
    shape = g.shape[2:]
    g = g.double().reshape(*g.shape[:2], -1)
    f, quartic, blocks = _powers(job, g.square(), part)
    sums = ParameterSums(
        a2=f.sum(0).view(shape),
        powers=_powers_in_batch(job, (quartic.sum(1), f.square().sum(1), blocks.sum(1)), part),
        gram=_in_batch(job, _inner(job, g), part),
        total=g.sum((0, 1)).view(shape),
    )
    if job.diagonals:
        sums.a4 = quartic.sum(0).view(shape)
        sums.q = f.square().sum(0).view(shape)
        sums.r = blocks.sum(0).view(shape)
    return sums


def _outer_moments(job: ChunkContext, delta: Tensor, x: Tensor) -> ParameterSums:
    """Linear on 2-D input: g_oi = δ_o x_i, so every moment is one in δ times a power of x."""
    delta = delta.double().reshape(job.draws, job.samples, -1)
    x = x[: job.samples].double()  # the draws' copies of x are equal
    whole = slice(0, job.samples)
    f, quartic, blocks = _powers(job, delta.square(), whole)
    x2 = x.square()
    x4 = x2.square()
    each = x4.sum(1)
    gram = _inner(job, delta)
    length = x2.sum(1).view(-1, *[1] * (gram.dim() - 1))
    sums = ParameterSums(
        a2=f.t() @ x2,
        powers=_powers_in_batch(job, [x.sum(1) * each for x in (quartic, f.square(), blocks)], whole),
        gram=_in_batch(job, gram * length, whole),
        total=delta.sum(0).t() @ x,
    )
    if job.diagonals:
        sums.a4, sums.q, sums.r = quartic.t() @ x4, f.square().t() @ x4, blocks.t() @ x4
    return sums


def _powers(job: ChunkContext, square: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_s w₂g², Σ_s w₄g⁴ and Σ_blocks(Σ_{s in block} w₂g²)² [n, P] of squares g² [S, n, P]."""
    if job.weights is None or job.weights.second is None:  # drawn labels, each a block
        own = square.square()
        quartic = own
        if job.weights is not None:
            quartic = own * job.weights.rows(part).fourth.t().unsqueeze(-1)
        return square.sum(0), quartic.sum(0), own.sum(0)
    weights = job.weights.rows(part)
    assert weights.second is not None
    blocks = torch.tensor(weights.blocks, device=square.device)
    member = nn.functional.one_hot(blocks).to(square)
    by_block = torch.einsum("sk,ns,snp->knp", member, weights.second.to(square), square)
    quartic = torch.einsum("ns,snp->np", weights.fourth.to(square), square.square())
    return by_block.sum(0), quartic, by_block.square().sum(0)


def _inner(job: ChunkContext, g: Tensor) -> Tensor:
    """Gram matrices [n, S, S] of g [S, n, P], or squared norms [n, S]."""
    if 1 < job.draws <= GRAM_LIMIT:
        return torch.einsum("snp,tnp->nst", g, g)
    return g.square().sum(-1).t()


def _powers_in_batch(job: ChunkContext, powers: Iterable[Tensor], part: slice) -> Tensor:
    """A4, Q and R [b] of the part's samples among those of the whole batch, [4, B]."""
    whole = torch.stack([*map(partial(_in_batch, job, part=part), powers)])
    return nn.functional.pad(whole, (0, 0, 0, 1))


def _in_batch(job: ChunkContext, value: Tensor, part: slice) -> Tensor:
    """The part's rows among those of the whole batch, the others zero."""
    whole = value.new_zeros(job.size, *value.shape[1:])
    whole[job.rows][part] = value
    return whole
