"""First-order BackPACK extension: A2, A4, Q, R and Gram matrices of all draws in one backward.

The n samples of a chunk are repeated S times along the batch, the draws outermost. Each layer's
per-sample gradients g [S, n, *parameter] are reduced to its parameters' sums at once.
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
from fimprobe.engines.problem.weights import GRAM_LIMIT, PassWeights
from fimprobe.errors import FimprobeError
from fimprobe.statistics import Moments, subsample_entries


@dataclass(kw_only=True)
class ParameterSums:
    """Sums of one parameter over some samples, in float64.

    Tensors of all samples have a place for each sample of the whole batch, zero for the others.
    """

    a2: Tensor
    """Σ_b Σ_s w g² of every entry."""
    powers: Tensor
    """A4, Q and R of each sample, and zeros for row 3 of ``Moments``, not computed here [4, B]."""
    gram: Tensor
    """Inner products [B, S, S], or squared norms [B, S]."""
    total: Tensor
    """Σ g of every entry, to be compared with the gradient."""
    a4: Tensor | None = None
    """A4 of every entry; None unless requested, as for Q and R."""
    q: Tensor | None = None
    r: Tensor | None = None

    def __add__(self, other: ParameterSums) -> ParameterSums:
        """The sums over both; they have no sample in common."""
        sums: dict[str, Any] = {
            name: None if value is None else value + getattr(other, name)
            for name, value in self.__dict__.items()
        }
        return ParameterSums(**sums)

    @property
    def squared_norms(self) -> Tensor:
        """‖g_bs‖² [B, S]."""
        return self.gram.diagonal(dim1=1, dim2=2) if self.gram.dim() == 3 else self.gram

    def finish(self, parameter: Tensor) -> Moments:
        """The moments of the parameter, A2 in its precision but at least float32."""
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


@dataclass(kw_only=True)
class ChunkContext:
    """A chunk as the extension sees it, and the sums that the extension computes."""

    rows: slice
    """The chunk's samples in the batch."""
    size: int
    """Samples of the whole batch."""
    draws: int
    """Draws S; each sample is repeated so many times."""
    diagonals: bool
    """Whether A4, Q and R are kept for every entry."""
    max_bytes: float
    """Maximum size of the per-sample gradients formed at once."""
    weights: PassWeights | None = None
    """Weights of the draws or passes."""
    score_mass: Tensor | None = None
    """See :class:`fimprobe.engines.problem.cotangents.Cotangents`."""
    sums: dict[int, ParameterSums] = field(default_factory=dict)
    """Sums of each parameter by its id."""

    @property
    def samples(self) -> int:
        """Samples n of the chunk."""
        return self.rows.stop - self.rows.start


class MomentsExtension(FirstOrderBackpropExtension):
    """Fills ``chunk.sums`` during one backward pass."""

    def __init__(self, chunk: ChunkContext) -> None:
        rules = {kind: _LayerMoments(*entry) for kind, entry in LAYERS.items()}
        super().__init__("fimprobe_moments", rules, fail_mode="ERROR")
        self.chunk = chunk
        self._visited: set[int] = set()

    def __call__(self, module: Any, g_inp: Any, g_out: Any) -> None:
        """Process a module, once: BackPACK keeps the inputs and outputs of its last call only."""
        copies = self.chunk.samples * self.chunk.draws
        sizes = {t.shape[0] for t in (g_out[0], getattr(module, "input0", g_out[0]))}
        if id(module) in self._visited or sizes != {copies}:
            raise FimprobeError(
                f"{type(module).__name__} was called more than once, or on something else than the "
                f"{copies} samples, unlike when the model was checked. Pass engine='autograd'."
            )
        self._visited.add(id(module))
        super().__call__(module, g_inp, g_out)


class _LayerMoments(FirstOrderModuleExtension):
    """A layer's moments, from BackPACK's per-sample products with its parameters' Jacobians."""

    def __init__(self, derivatives: Any, params: tuple[str, ...]) -> None:
        self.derivatives = derivatives
        for name in params:
            setattr(self, name, partial(self._moments, name))
        super().__init__(params=list(params))

    def _moments(self, name, ext, module, g_inp, g_out, backproped):
        """Compute one parameter's sums; called by BackPACK with the signature of its extensions."""
        chunk: ChunkContext = ext.chunk
        parameter, delta, x = getattr(module, name), g_out[0].detach(), module.input0.detach()
        if type(module) is nn.Linear and name == "weight" and x.dim() == 2:
            sums = _outer_product_moments(chunk, delta, x)
        else:
            sums = reduce(add, self._partial_sums(chunk, name, module, g_inp, g_out))
        chunk.sums[id(parameter)] = sums

    def _partial_sums(self, chunk, name, module, g_inp, g_out) -> Iterator[ParameterSums]:
        """Sums over as many samples at a time as fit into ``max_bytes``."""
        parameter, delta = getattr(module, name), g_out[0].detach()
        # eight float64 copies of g: itself, its powers and their products
        step = max(1, int(chunk.max_bytes / (chunk.draws * parameter.numel() * 8 * 8)))
        draws = torch.arange(chunk.draws, device=delta.device)[:, None] * chunk.samples
        for start in range(0, chunk.samples, step):
            samples = slice(start, min(start + step, chunk.samples))
            inside = torch.arange(samples.start, samples.stop, device=delta.device)
            index = (draws + inside).flatten()
            g = self.derivatives.param_mjp(
                name, module, g_inp, g_out, delta[index], sum_batch=False, subsampling=index
            )
            yield _moments_of(chunk, g.reshape(chunk.draws, len(inside), *parameter.shape), samples)


def _moments_of(chunk: ChunkContext, g: Tensor, samples: slice) -> ParameterSums:
    """Sums of per-sample gradients [S, n, *shape] of some samples of the chunk."""
    shape = g.shape[2:]
    g = g.double().reshape(*g.shape[:2], -1)
    f, quartic, blocks = _powers(chunk, g.square(), samples)
    q = f.square()
    sums = ParameterSums(
        a2=f.sum(0).view(shape),
        powers=_powers_in_batch(chunk, (quartic.sum(1), q.sum(1), blocks.sum(1)), samples),
        gram=_in_batch(chunk, _inner_products(chunk, g), samples),
        total=g.sum((0, 1)).view(shape),
    )
    if chunk.diagonals:
        sums.a4 = quartic.sum(0).view(shape)
        sums.q = q.sum(0).view(shape)
        sums.r = blocks.sum(0).view(shape)
    return sums


def _outer_product_moments(chunk: ChunkContext, delta: Tensor, x: Tensor) -> ParameterSums:
    """Sums of a Linear weight, g_oi = δ_o x_i: each moment is one of δ times a power of x.

    Args:
        chunk: The chunk.
        delta: Cotangents δ [S·n, o].
        x: Inputs [S·n, i].
    """
    delta = delta.double().reshape(chunk.draws, chunk.samples, -1)
    x = x[: chunk.samples].double()  # the draws' copies of x are equal
    samples = slice(0, chunk.samples)
    f, quartic, blocks = _powers(chunk, delta.square(), samples)
    q = f.square()
    x2 = x.square()
    x4 = x2.square()
    x4_sum = x4.sum(1)
    gram = _inner_products(chunk, delta)
    length = x2.sum(1).view(-1, *[1] * (gram.dim() - 1))
    powers = [power.sum(1) * x4_sum for power in (quartic, q, blocks)]
    sums = ParameterSums(
        a2=f.t() @ x2,
        powers=_powers_in_batch(chunk, powers, samples),
        gram=_in_batch(chunk, gram * length, samples),
        total=delta.sum(0).t() @ x,
    )
    if chunk.diagonals:
        sums.a4, sums.q, sums.r = quartic.t() @ x4, q.t() @ x4, blocks.t() @ x4
    return sums


def _powers(chunk: ChunkContext, square: Tensor, samples: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_s w₂g², Σ_s w₄g⁴ and Σ_blocks(Σ_{s in block} w₂g²)² [n, P] of squares g² [S, n, P]."""
    if chunk.weights is None or chunk.weights.square is None:  # drawn labels, each a block
        fourth = square.square()
        quartic = fourth
        if chunk.weights is not None:
            quartic = fourth * chunk.weights.rows(samples).quartic.t().unsqueeze(-1)
        return square.sum(0), quartic.sum(0), fourth.sum(0)
    weights = chunk.weights.rows(samples)
    assert weights.square is not None
    blocks = torch.tensor(weights.block, device=square.device)
    member = nn.functional.one_hot(blocks).to(square)
    by_block = torch.einsum("sk,ns,snp->knp", member, weights.square.to(square), square)
    quartic = torch.einsum("ns,snp->np", weights.quartic.to(square), square.square())
    return by_block.sum(0), quartic, by_block.square().sum(0)


def _inner_products(chunk: ChunkContext, g: Tensor) -> Tensor:
    """Gram matrices [n, S, S] of g [S, n, P], or squared norms [n, S]."""
    if 1 < chunk.draws <= GRAM_LIMIT:
        return torch.einsum("snp,tnp->nst", g, g)
    return g.square().sum(-1).t()


def _powers_in_batch(chunk: ChunkContext, powers: Iterable[Tensor], samples: slice) -> Tensor:
    """A4, Q and R [b] of some samples at their places in the whole batch, and zeros: [4, B]."""
    rows = torch.stack([_in_batch(chunk, power, samples) for power in powers])
    return nn.functional.pad(rows, (0, 0, 0, 1))


def _in_batch(chunk: ChunkContext, values: Tensor, samples: slice) -> Tensor:
    """Values [b, ...] of some samples of the chunk at their places in the whole batch [B, ...]."""
    rows = values.new_zeros(chunk.size, *values.shape[1:])
    rows[chunk.rows][samples] = values
    return rows
