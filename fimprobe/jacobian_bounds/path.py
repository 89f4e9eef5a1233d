"""Norm of the outputs' derivative along a path, and the place of the batch in a tensor's layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimprobe.jacobian_bounds.graph import AutogradGraph, Edge, signed


@dataclass(frozen=True, kw_only=True)
class PathNorm:
    """Norms and layout of ∂h_L/∂z, z being the tensor that a path has reached."""

    spectral: Tensor
    """A bound of s_max(∂h_L/∂z) for each sample, float64 [B]."""
    frobenius_ratio: float = math.inf
    """min_j ‖A_j‖_F / s_j over the weights' operators on the path."""
    dims: int | float = math.inf
    """The least dimension of a sample's tensor on the path, which bounds the rank."""
    outer: int = 1
    """Elements of z that come before the batch dimension in its layout."""
    above: str = "the outputs"
    """The last layer on the path, quoted for messages."""
    bias: Tensor | None = None
    """A bias that is added after the product with its weight, which comes next."""
    edges: int = 1
    """Uses of the next node that the path covers."""


class Unbounded(Exception):
    """The path ends here; the message is the reason."""


def scaled(
    graph: AutogradGraph, path: PathNorm, factor: Tensor | float, edge: Edge, *, outer: int = 0
) -> PathNorm:
    """The path behind an operator.

    Args:
        graph: The autograd graph.
        path: The path in front of the operator.
        factor: A bound of the operator's norm, one for all samples or [B].
        edge: The operator, for messages.
        outer: Elements before the batch behind it; 0 if they do not change.

    Raises:
        Unbounded: If the factor is not finite.
    """
    factor = torch.as_tensor(factor, dtype=torch.float64)
    if not bool(torch.isfinite(factor).all()):
        raise Unbounded(f"the derivative is not bounded {graph.location(edge, path.above)}")
    return replace(path, spectral=path.spectral * factor, outer=outer or path.outer)


def per_sample(graph: AutogradGraph, x: Tensor, outer: int) -> Tensor:
    """The largest element of each sample.

    Args:
        graph: The autograd graph, with the number B of samples.
        x: A tensor that holds the batch, with B times ``outer`` times any number of elements.
        outer: Elements of ``x`` that come before the batch in its layout.

    Returns:
        The maxima, float64 [B], on the CPU.
    """
    return x.reshape(outer, graph.size, -1).amax((0, 2)).cpu().double()


def outer_behind(
    graph: AutogradGraph,
    edge: Edge,
    shape: tuple[int, ...],
    shape_behind: tuple[int, ...],
    touched: set[int],
    path: PathNorm,
) -> int:
    """Elements before the batch behind an operator.

    Args:
        graph: The autograd graph.
        edge: The operator, for messages.
        shape: Shape of its output.
        shape_behind: Shape of its input, with as many dimensions.
        touched: The dimensions that it acts on.
        path: The path in front of it.

    Raises:
        Unbounded: If it acts on the dimension that holds the batch.
    """
    if graph.size == 1:
        return 1
    dim, inside = _batch_dim(graph, edge, shape, path)
    if dim in touched or shape[dim] != shape_behind[dim]:
        raise Unbounded(graph.mixed_samples(edge, path.above))
    return math.prod(shape_behind[:dim]) * inside


def outer_transposed(graph: AutogradGraph, edge: Edge, path: PathNorm) -> int:
    """Elements before the batch behind a transpose or permutation.

    Args:
        graph: The autograd graph.
        edge: The function, of a kind in ``TRANSPOSING``.
        path: The path in front of it.

    Returns:
        The number for its input; 1 for a batch of one sample.

    Raises:
        Unbounded: If the batch cannot be located in its output.
    """
    if graph.size == 1:
        return 1
    shape, node = edge.shape, edge.node
    order = list(range(len(shape)))  # dimension of the output -> dimension of the input
    if edge.kind == "Permute":
        order = [signed(d) % len(shape) for d in node._saved_dims]
    elif len(shape) > 1:
        a, b = (0, 1) if edge.kind == "T" else (signed(node._saved_dim0), signed(node._saved_dim1))
        order[a], order[b] = order[b], order[a]
    dim, inside = _batch_dim(graph, edge, shape, path)
    before = [shape[order.index(d)] for d in range(order[dim])]
    return math.prod(before) * inside


def _batch_dim(
    graph: AutogradGraph, edge: Edge, shape: tuple[int, ...], path: PathNorm
) -> tuple[int, int]:
    """The dimension that holds the batch, and how many of its elements come before the batch.

    A dimension may hold the batch together with others, as after ``flatten``.
    """
    before = 1
    for dim, n in enumerate(shape):
        if path.outer < before * n:
            inside = path.outer // before
            if path.outer % before or n % (inside * graph.size):
                break
            return dim, inside
        before *= n
    raise Unbounded(graph.mixed_samples(edge, path.above))
