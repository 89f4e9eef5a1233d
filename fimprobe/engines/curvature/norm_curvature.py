"""Second derivatives of normalisation layers in closed form, found in the autograd graph.

A norm maps x [..., D] to x̂ = r x with r = (mean x² + ε)^(−1/2); a LayerNorm centres x first. For a
cotangent g at x̂, centred for a LayerNorm, the second derivative of gᵀx̂ in x is, with s = gᵀx̂,
ĝ = g − 3s/(2D) x̂ and P the projection that centres (the identity for RMSNorm),

    Q = −(r²/D) (x̂ĝᵀ + ĝx̂ᵀ + s P).

See docs/theory.md, "Curvature propagation".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_TINY = 1e-30
"""Below this norm a vector is zero, in float32 as well."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NormNode:
    """A normalisation in the graph.

    Attributes:
        node: The operation that returns x̂, or γ∘x̂ + β if it applies an affine map as well.
        members: All its operations.
        entry: The place of x.
        centred: Whether it subtracts the mean.
    """

    node: Any
    members: frozenset[Any]
    entry: GradientEdge
    centred: bool


class _Normalised(NamedTuple):
    """What a norm computed.

    Attributes:
        x_hat: x̂.
        rate: r [..., 1].
        weight: γ; None for ones.
        dims: The normalised dimensions.
    """

    x_hat: Tensor
    rate: Tensor
    weight: Tensor | None
    dims: tuple[int, ...]


def find_norms(nodes: Iterable[Any]) -> list[NormNode]:
    """Find LayerNorms, and RMSNorms that are written as x · rsqrt(mean(x²) + ε).

    Args:
        nodes: Operations of the graph.
    """
    nodes = list(nodes)
    consumers: dict[Any, set[Any]] = {}
    for node in nodes:
        for argument, _ in node.next_functions:
            consumers.setdefault(argument, set()).add(node)
    norms = []
    for node in nodes:
        norm = _layer_norm(node) or _rms_norm(node)
        if norm is None or not _keeps_its_values(norm):
            continue
        inner = norm.members - {node}
        if all(consumers[member] <= norm.members for member in inner):
            norms.append(norm)
    return norms


def curvature_vectors(
    norm: NormNode, cotangent: Tensor, signs: Callable[[str, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Draw a and b at x with E a bᵀ = Q within each position, and 0 between positions.

    With a sign ω for each position, signs w for each entry, c = −r²/D and β = √(‖ĝ‖/‖x̂‖),
    a = ω√(2|c|) β x̂ + √|cs| Pw and b = −ω√(2|c|) ĝ/β + sgn(cs) √|cs| Pw: symmetrised, E a bᵀ = Q.

    Args:
        norm: The norm.
        cotangent: The cotangent at its output.
        signs: Maps a name and a tensor to random signs of its shape.

    Returns:
        a and b, of the shape of x.
    """
    values = _normalised(norm)
    x_hat, rate, dims = values.x_hat, values.rate, values.dims
    g = cotangent.to(x_hat.dtype)
    if values.weight is not None:
        g = g * values.weight.to(g.dtype)
    width = 1
    for dim in dims:
        width *= x_hat.shape[dim]
    if norm.centred:
        g = g - g.mean(dims, keepdim=True)
    s = (g * x_hat).sum(dims, keepdim=True)
    g = g - 1.5 * s / width * x_hat
    c = -rate.square() / width
    beta = (_norm(g, dims) / _norm(x_hat, dims)).sqrt()
    w = signs("entries", x_hat)
    if norm.centred:
        w = w - w.mean(dims, keepdim=True)
    w = (c * s).abs().sqrt() * w
    outer = signs("positions", s) * (2 * c.abs()).sqrt()
    a = outer * beta * x_hat + w
    b = (c * s).sign() * w - outer * g / beta
    return a.to(cotangent.dtype), b.to(cotangent.dtype)


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.square().sum(dims, keepdim=True).sqrt().clamp(min=_TINY)


def _layer_norm(node: Any) -> NormNode | None:
    if node.name() != "NativeLayerNormBackward0":
        return None
    entry = node.next_functions[0]
    if entry[0] is None:
        return None
    return NormNode(node=node, members=frozenset([node]), entry=GradientEdge(*entry), centred=True)


def _rms_norm(node: Any) -> NormNode | None:
    """The norm whose last operation, the product of x and its rate, is ``node``."""
    arguments = node.next_functions
    if node.name() != "MulBackward0" or any(argument is None for argument, _ in arguments):
        return None
    for rate, x in (arguments, arguments[::-1]):
        members, inner = [node, rate[0]], rate[0]
        if inner.name() != "RsqrtBackward0":
            continue
        inner = inner.next_functions[0][0]
        if inner is not None and inner.name().startswith("AddBackward"):
            members.append(inner)
            inner = inner.next_functions[0][0]
        if inner is None or not inner.name().startswith("MeanBackward"):
            continue
        members.append(inner)
        inner = inner.next_functions[0][0]
        if inner is None or inner.name() != "PowBackward0" or inner._saved_exponent != 2:
            continue
        members.append(inner)
        if inner.next_functions[0] == x:
            return NormNode(
                node=node, members=frozenset(members), entry=GradientEdge(*x), centred=False
            )
    return None


def _keeps_its_values(norm: NormNode) -> bool:
    """Whether x̂ can be computed again, and positions are the leading dimensions."""
    try:
        values = _normalised(norm)
    except (RuntimeError, AttributeError):  # overwritten in place, or freed
        return False
    expected = [
        1 if d - values.x_hat.dim() in values.dims else n for d, n in enumerate(values.x_hat.shape)
    ]
    return list(values.rate.shape) == expected


def _normalised(norm: NormNode) -> _Normalised:
    """x̂ and r from what the operations keep for their backward."""
    if norm.centred:
        node = norm.node
        dims = tuple(range(-len(node._saved_normalized_shape), 0))
        rate = node._saved_result2.detach()
        x_hat = (node._saved_input.detach().to(rate.dtype) - node._saved_result1.detach()) * rate
        weight = node._saved_weight
        return _Normalised(x_hat, rate, None if weight is None else weight.detach(), dims)
    x, rate = norm.node._saved_self.detach(), norm.node._saved_other.detach()
    if norm.node.next_functions[0][0].name() == "RsqrtBackward0":
        x, rate = rate, x
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return _Normalised(x.to(wide) * rate.to(wide), rate.to(wide), None, (-1,))
