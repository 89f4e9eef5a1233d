"""Sums of powers of gradients, and what keeps fourth powers inside float32's range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.engines.problem.weights import GRAM_LIMIT, Weights


@dataclass
class OuterProductPowers:
    """Powers of δ [b, S, o] (over ``scale``) that moments of δ xᵀ factor into, and of δ itself."""

    square: Tensor
    weights: Weights | None
    scale: Tensor | None
    f: Tensor
    """Σ_s w δ² [b, o]."""
    blocks: list[Tensor]
    sums: Tensor
    """Of each sample, over o: A4, Q, R and top, float64 [4, b]."""
    inner: Tensor
    """Inner products of the draws, float64 [b, S, S], or squared norms [b, S]."""

    @classmethod
    def of(
        cls, delta: Tensor, weights: Weights | None, *, rescale: bool
    ) -> OuterProductPowers | None:
        """None where float32 did not hold δ⁴ as it is; with ``rescale`` it does."""
        scale: Tensor | None = None
        if rescale:
            scale = torch.ones((), dtype=torch.float64, device=delta.device)
            if delta.dtype != torch.float64:
                scale = power_of_two_scale(delta)
                delta = delta * (1 / scale).to(delta.dtype)
        square = delta.square()
        each = torch.linalg.vecdot(square, square)
        if not held(each, scale):
            return None
        f, blocks, sums = sample_powers(square, each, weights)
        inner = inner_products(delta) if 1 < delta.shape[1] <= GRAM_LIMIT else square.sum(-1)
        return cls(square, weights, scale, f, blocks, sums, inner.double())

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """A4, Q and R of each entry of δ [b, o], in float64."""
        quartic, own, rest = Powers(self.f, self.blocks, self.sums).entries(self.square, self.weights)
        return quartic.sum(1), own, rest


def beside(factors: Tensor, x: Tensor) -> Tensor:
    """[b] in a shape that multiplies the samples of ``x``."""
    return factors.view(-1, *[1] * (x.dim() - 1))


class Powers(NamedTuple):
    """Of g² [b, S, P]: F_b = Σ_s w g² [b, P], the same for each block, and A4, Q, R, top [4, b].

    Of drawn labels, each a block of its own, ``blocks`` holds nothing but F_b.
    """

    f: Tensor
    blocks: list[Tensor]
    sums: Tensor

    def entries(self, square: Tensor, weights: Weights | None) -> tuple[Tensor, Tensor, Tensor]:
        """A4 [b, S, P], Q and R [b, P] of every entry, in float64."""
        quartic = square.double().square()
        own = self.f.double().square()
        if drawn(weights):
            rest = quartic.sum(1)
            if weights is not None:
                quartic *= weights.fourth.double().unsqueeze(-1)
            return quartic, own, rest
        assert weights is not None
        quartic *= weights.fourth.double().unsqueeze(-1)
        if len(self.blocks) == 1:
            return quartic, own, own
        rest = torch.zeros_like(own)
        for block in self.blocks:
            rest += block.double().square()
        return quartic, own, rest


def power_sums(square: Tensor, weights: Weights | None, scale: Tensor | None) -> Powers | None:
    """Sums of g² and g⁴ [b, S, P] over all entries; None where float32 did not hold g⁴."""
    each = torch.linalg.vecdot(square, square)
    if not held(each, scale):
        return None
    return Powers(*sample_powers(square, each, weights))


def sample_powers(
    square: Tensor, each: Tensor, weights: Weights | None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """F_b = Σ_s w g² [b, P], the same for each block, and A4, Q, R, top [4, b] of each sample.

    Args:
        square: g² [b, S, P].
        each: Σ_i g⁴ [b, S].
        weights: of the draws or passes.
    """
    blocks = _block_sums(square, weights)
    f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
    wide = each.double()
    fourth = wide if weights is None else wide * weights.fourth
    fourth = fourth.squeeze(1) if fourth.shape[1] == 1 else fourth.sum(1)
    top = torch.zeros_like(fourth)
    if drawn(weights):
        r = q = wide.squeeze(1) if wide.shape[1] == 1 else wide.sum(1)
        if wide.shape[1] > 1:
            q = _products(f, f, weights)
        return f, blocks, torch.stack([fourth, q, r, top])
    q = r = _products(f, f, weights)
    if len(blocks) > 1:
        r = torch.stack([_products(t, t, weights) for t in blocks]).sum(0)
    else:
        top = _products(f, square.amax(1), weights)
    return f, blocks, torch.stack([fourth, q, r, top])


def drawn(weights: Weights | None) -> bool:
    """Whether labels were drawn, from the model or size-biased: squares are summed as they are."""
    return weights is None or weights.second is None


def held(powers: Tensor, scale: Tensor | None) -> bool:
    """Whether float32 held the fourth powers; of scaled ones it is known, and not asked.

    What is flushed to zero, below 1e-38, is then less than a billionth of their sum.
    """
    if scale is not None or powers.dtype == torch.float64:
        return True
    return 1e-20 < float(powers.sum()) < 1e30


def undo_scale(square: Tensor, scale: Tensor | None) -> Tensor:
    """Squares of what was divided by ``scale``."""
    return square if scale is None or is_one(scale) else square * scale.to(square.dtype) ** 2


def power_of_two_scale(*tensors: Tensor) -> Tensor:
    """The power of two next above the product of the tensors' largest magnitudes; 1 for zero.

    Dividing by it is exact and keeps fourth powers inside float32's range. 1 as well where the
    product is moderate and looking at it costs no synchronisation.
    """
    product = torch.ones((), dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        low, high = torch.aminmax(x)
        product = product * torch.maximum(-low, high).double()
    if product.device.type == "cpu" and (float(product) == 0 or 1e-3 < float(product) < 1e3):
        return torch.ones_like(product)
    product = torch.where((product > 0) & torch.isfinite(product), product, 1.0)
    return torch.exp2(torch.ceil(torch.log2(product)))


def is_one(scale: Tensor) -> bool:
    """Whether a scale does nothing; never asked of a GPU, which would have to be waited for."""
    return scale.device.type == "cpu" and float(scale) == 1


def _products(x: Tensor, y: Tensor, weights: Weights | None) -> Tensor:
    """Σ x y of each sample [b] of sums over draws; weights may take their squares out of range."""
    found = torch.linalg.vecdot(x, y)
    looks = not drawn(weights) and found.device.type == "cpu"
    if looks and not held(found, None):
        found = torch.linalg.vecdot(x.double(), y.double())
    return found.double()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y over all entries, in float64 from there on."""
    return torch.dot(x.reshape(-1), y.reshape(-1)).double()


def inner_products(rows: Tensor) -> Tensor:
    """The inner products [b, S, S] of each sample's S rows [b, S, P], S being small."""
    draws = rows.shape[1]
    if draws > 3:
        return torch.bmm(rows, rows.transpose(1, 2))
    found = rows.new_empty(len(rows), draws, draws)
    for s in range(draws):
        for t in range(s, draws):
            found[:, s, t] = found[:, t, s] = torch.linalg.vecdot(rows[:, s], rows[:, t])
    return found


def _block_sums(square: Tensor, weights: Weights | None) -> list[Tensor]:
    """Σ over each block's passes of weight·g² [b, P]."""
    if weights is None or weights.second is None:
        return [square.squeeze(1) if square.shape[1] == 1 else square.sum(1)]
    second = weights.second.to(square.dtype).unsqueeze(1)
    return [torch.bmm(second[..., p], square[:, p]).squeeze(1) for p in weights.parts()]
