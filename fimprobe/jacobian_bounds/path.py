"""What is known of the outputs' derivative on the way down, and where the batch is in a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimprobe.jacobian_bounds.graph import AutogradGraph, Edge, signed


@dataclass(frozen=True)
class PathNorm:
    """What is known of ∂h_L/∂(a tensor); ``outer`` elements come before the batch in its layout."""

    spectral: Tensor
    constant: Tensor
    frobenius_ratio: float = math.inf
    """min_j ‖A_j‖_F / s_j over the weights' operators."""
    unsafe: float = 1.0
    dims: int | float = math.inf
    outer: int = 1
    above: str = "the outputs"
    bias: Tensor | None = None
    """A bias added after the product with its weight, which comes next."""
    edges: int = 1
    """Uses of the next node that are accounted for."""


class Unbounded(Exception):
    """The chain ends here: the reason."""


def scaled(
    net: AutogradGraph, path: PathNorm, factor: Tensor | float, edge: Edge, *, outer: int = 0
) -> PathNorm:
    """The path behind an operator of norm ``factor``."""
    factor = torch.as_tensor(factor, dtype=torch.float64)
    if not bool(torch.isfinite(factor).all()):
        raise Unbounded(f"the derivative is not bounded {net.between(edge, path.above)}")
    return replace(
        path,
        spectral=path.spectral * factor,
        constant=path.constant * factor,
        outer=outer or path.outer,
    )


def per_sample(net: AutogradGraph, x: Tensor, outer: int) -> Tensor:
    """The largest element of each sample [B]."""
    return x.reshape(outer, net.size, -1).amax((0, 2)).cpu().double()


def outer_behind(
    net: AutogradGraph,
    edge: Edge,
    shape: tuple[int, ...],
    shape_behind: tuple[int, ...],
    touched: set[int],
    path: PathNorm,
) -> int:
    """Elements before the batch behind an operator that acts on the dimensions ``touched``."""
    if net.size == 1:
        return 1
    dim, inside = _batch_dim(net, edge, shape, path)
    if dim in touched or shape[dim] != shape_behind[dim]:
        raise Unbounded(net.mixes(edge, path.above))
    return math.prod(shape_behind[:dim]) * inside


def outer_moved(net: AutogradGraph, edge: Edge, path: PathNorm) -> int:
    """Elements before the batch behind a transpose or permutation."""
    if net.size == 1:
        return 1
    shape, node = edge.shape, edge.node
    order = list(range(len(shape)))  # dimension of the output -> dimension of the input
    if edge.kind == "Permute":
        order = [signed(d) % len(shape) for d in node._saved_dims]
    elif len(shape) > 1:
        a, b = (0, 1) if edge.kind == "T" else (signed(node._saved_dim0), signed(node._saved_dim1))
        order[a], order[b] = order[b], order[a]
    dim, inside = _batch_dim(net, edge, shape, path)
    before = [shape[order.index(d)] for d in range(order[dim])]
    return math.prod(before) * inside


def _batch_dim(
    net: AutogradGraph, edge: Edge, shape: tuple[int, ...], path: PathNorm
) -> tuple[int, int]:
    """The dimension that holds the batch, and the elements before the batch inside of it."""
    before = 1
    for dim, n in enumerate(shape):
        if path.outer < before * n:
            inside = path.outer // before
            if path.outer % before or n % (inside * net.size):
                break
            return dim, inside
        before *= n
    raise Unbounded(net.mixes(edge, path.above))
