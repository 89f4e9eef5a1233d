"""Sums of powers of gradients.

Symbols: b samples, S draws (or exact passes), P entries, w the weights of g², w₄ those of g⁴. A4, Q,
R and top are defined at :class:`fimprobe.statistics.Moments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.engines.moments.scaling import in_float32_range, power_of_two_scale
from fimprobe.engines.problem.weights import GRAM_LIMIT, PassWeights

LARGE_ELEMENTS = 4096
"""Entries from which sums of squares are computed in float32 on a CPU, if they stay in its range."""

FEW_DRAWS = 3
"""Up to so many draws, operations for each are faster than one over all of them."""


@dataclass(kw_only=True)
class OuterProductPowers:
    """Powers of δ [b, S, o], into which the moments of δ and of δ xᵀ factor.

    See docs/theory.md, "Sums without per-sample gradients". Everything refers to δ / ``scale``.
    """

    square: Tensor
    """δ² [b, S, o]."""
    weights: PassWeights | None
    scale: Tensor | None
    f: Tensor
    """Σ_s w δ² [b, o]."""
    blocks: list[Tensor]
    """Σ w δ² over the passes of each block."""
    sums: Tensor
    """A4, Q, R and top of each sample, summed over o: float64 [4, b]."""
    inner: Tensor
    """Inner products of the draws, float64 [b, S, S], or squared norms [b, S]."""

    @classmethod
    def of(
        cls, delta: Tensor, weights: PassWeights | None, *, rescale: bool
    ) -> OuterProductPowers | None:
        """The powers of δ [b, S, o]; None where δ⁴ leaves float32's range and must be rescaled.

        Args:
            delta: The cotangents δ.
            weights: Weights of the passes.
            rescale: Whether δ is divided by a power of two first; the result is then never None.
        """
        scale: Tensor | None = None
        if rescale:
            scale = torch.ones((), dtype=torch.float64, device=delta.device)
            if delta.dtype != torch.float64:
                scale = power_of_two_scale(delta)
                delta = delta * (1 / scale).to(delta.dtype)
        square = delta.square()
        fourth = sums_of_squares(square)
        if not in_float32_range(fourth, scale):
            return None
        powers = sample_powers(square, fourth, weights)
        inner = inner_products(delta) if 1 < delta.shape[1] <= GRAM_LIMIT else square.sum(-1)
        return cls(
            square=square,
            weights=weights,
            scale=scale,
            f=powers.f,
            blocks=powers.blocks,
            sums=powers.sums,
            inner=inner.double(),
        )

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """A4, Q and R of each entry of δ [b, o], in float64."""
        powers = Powers(f=self.f, blocks=self.blocks, sums=self.sums)
        quartic, q, r = powers.entries(self.square, self.weights)
        return quartic.sum(1), q, r


class Powers(NamedTuple):
    """Sums of powers of gradients g [b, S, P].

    Attributes:
        f: F_b = Σ_s w g² [b, P].
        blocks: The same sum over the passes of each block. Drawn labels are blocks of their own;
            the list then holds ``f`` alone.
        sums: A4, Q, R and top of each sample, over all entries: float64 [4, b].
    """

    f: Tensor
    blocks: list[Tensor]
    sums: Tensor

    def entries(self, square: Tensor, weights: PassWeights | None) -> tuple[Tensor, Tensor, Tensor]:
        """A4 before the sum over draws [b, S, P], Q and R [b, P] of every entry, in float64.

        Args:
            square: g² [b, S, P].
            weights: Weights of the passes.
        """
        quartic = square.double().square()
        q = self.f.double().square()
        if has_sampled_labels(weights):
            r = quartic.sum(1)
            if weights is not None:
                quartic *= weights.quartic.double().unsqueeze(-1)
            return quartic, q, r
        assert weights is not None
        quartic *= weights.quartic.double().unsqueeze(-1)
        if len(self.blocks) == 1:
            return quartic, q, q
        r = torch.zeros_like(q)
        for block in self.blocks:
            r += block.double().square()
        return quartic, q, r


def power_sums(square: Tensor, weights: PassWeights | None, scale: Tensor | None) -> Powers | None:
    """Sums of powers of gradients; None where g⁴ leaves float32's range.

    Args:
        square: g² [b, S, P], divided by ``scale``².
        weights: Weights of the passes.
        scale: The power of two that g was divided by; None if it was not.
    """
    fourth = sums_of_squares(square)
    if not in_float32_range(fourth, scale):
        return None
    return sample_powers(square, fourth, weights)


def sample_powers(square: Tensor, fourth: Tensor, weights: PassWeights | None) -> Powers:
    """Sums of powers of gradients, whose fourth powers are known to be in range.

    Args:
        square: g² [b, S, P].
        fourth: Σ_i g⁴ [b, S].
        weights: Weights of the passes.
    """
    blocks = _block_sums(square, weights)
    f = blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)
    fourth = fourth.double()
    a4 = _sum_draws(fourth if weights is None else fourth * weights.quartic)
    top = coincidence_sums(fourth, weights)
    if has_sampled_labels(weights):
        q = r = _sum_draws(fourth)
        if fourth.shape[1] > 1:
            q = _squares(f, weights)
        return Powers(f=f, blocks=blocks, sums=torch.stack([a4, q, r, top]))
    q = r = _squares(f, weights)
    if len(blocks) > 1:
        r = torch.stack([_squares(block, weights) for block in blocks]).sum(0)
    else:
        # f is a mean of what the maximum is of: the two sums are rounded differently
        top = torch.maximum(_products(f, square.amax(1), weights), q)
    return Powers(f=f, blocks=blocks, sums=torch.stack([a4, q, r, top]))


def coincidence_sums(fourth: Tensor, weights: PassWeights | None) -> Tensor:
    """Σ_s c_s Σ_i ĝ_s⁴ of each sample, with the coincidences c_s; zeros where they are not known.

    Args:
        fourth: Σ_i ĝ⁴ of every draw [..., b, S].
        weights: Weights of the passes.

    Returns:
        The sums [..., b], in the type of ``fourth``.
    """
    if weights is None or weights.coincidences is None:
        return torch.zeros_like(fourth[..., 0])
    return torch.linalg.vecdot(fourth, weights.coincidences.to(fourth.dtype))


def has_sampled_labels(weights: PassWeights | None) -> bool:
    """Whether labels were drawn, from the model or size-biased, so that g² has no weight."""
    return weights is None or weights.square is None


def broadcast_samples(factors: Tensor, x: Tensor) -> Tensor:
    """Reshape one factor per sample so that it multiplies the samples of ``x``.

    Args:
        factors: Factors [b].
        x: A tensor [b, ...].

    Returns:
        The factors [b, 1, ...], with as many dimensions as ``x``.
    """
    return factors.view(-1, *[1] * (x.dim() - 1))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y over all entries, in float64 after a sum in the type of the tensors.

    Args:
        x: A tensor of any shape.
        y: A tensor with as many entries, of the type of ``x``.

    Returns:
        The inner product, a scalar in float64.
    """
    return torch.dot(x.reshape(-1), y.reshape(-1)).double()


def square_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x² of each tensor [n], float64; in few operations, whatever the number of tensors.

    Args:
        tensors: At least one, on one device.
    """
    flat = [x.reshape(-1) if x.dim() != 1 else x for x in tensors]
    fast = [
        i
        for i, x in enumerate(flat)
        if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > LARGE_ELEMENTS
    ]
    result = torch.zeros(len(flat), dtype=torch.float64, device=flat[0].device)
    if fast:
        squares = torch.stack([torch.dot(flat[i], flat[i]) for i in fast]).tolist()
        # sums in float32 are several times faster on a CPU, where they stay in range
        known = {i: square for i, square in zip(fast, squares, strict=True) if 1e-25 < square < 1e30}
        if known:
            result[list(known)] = result.new_tensor(list(known.values()))
        fast = list(known)
    others = sorted(set(range(len(flat))) - set(fast))
    if others:
        norms = torch._foreach_norm([flat[i] for i in others], 2, dtype=torch.float64)
        squares_of_others = torch.stack(list(norms)).square()
        if len(others) == len(flat):
            return squares_of_others
        result[others] = squares_of_others
    return result


def inner_products(rows: Tensor) -> Tensor:
    """Inner products [b, S, S] of each sample's rows [b, S, P]."""
    draws = rows.shape[1]
    if draws > FEW_DRAWS:
        return torch.bmm(rows, rows.transpose(1, 2))
    # a batched product of so few rows is slower than their dot products
    gram = rows.new_empty(len(rows), draws, draws)
    for s in range(draws):
        for t in range(s, draws):
            if s == t:
                gram[:, s, s] = sums_of_squares(rows[:, s])
            else:
                gram[:, s, t] = gram[:, t, s] = torch.linalg.vecdot(rows[:, s], rows[:, t])
    return gram


def _sum_draws(x: Tensor) -> Tensor:
    """Σ_s of [b, S, ...]; of few draws without a reduction, which is slow where they are not last."""
    first, *others = x.unbind(1)
    if len(others) >= FEW_DRAWS:
        return x.sum(1)
    total = first
    for draw in others:
        total = total + draw
    return total


def sums_of_squares(x: Tensor) -> Tensor:
    """Σ x² over the last dimension, in the type of ``x``; a norm forms no tensor of squares."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def _products(x: Tensor, y: Tensor, weights: PassWeights | None) -> Tensor:
    """Σ x y of each sample [b], in float64; ``x`` and ``y`` [b, P] are sums over draws."""
    products = torch.linalg.vecdot(x, y)
    if _left_range(products, weights):
        products = torch.linalg.vecdot(x.double(), y.double())
    return products.double()


def _squares(x: Tensor, weights: PassWeights | None) -> Tensor:
    """Σ x² of each sample [b], in float64; ``x`` [b, P] is a sum over draws."""
    squares = sums_of_squares(x)
    if _left_range(squares, weights):
        squares = sums_of_squares(x.double())
    return squares.double()


def _left_range(products: Tensor, weights: PassWeights | None) -> bool:
    """Whether weights took squares of sums out of float32's range although g⁴ is inside it."""
    check = not has_sampled_labels(weights) and products.device.type == "cpu"
    return check and not in_float32_range(products, None)


def _block_sums(square: Tensor, weights: PassWeights | None) -> list[Tensor]:
    """Σ_s w g² [b, P] over each block's passes; one sum for drawn labels."""
    if weights is None or weights.square is None:
        return [_sum_draws(square)]
    factors = weights.square.to(square.dtype).unsqueeze(1)
    return [torch.bmm(factors[..., p], square[:, p]).squeeze(1) for p in weights.block_slices()]
