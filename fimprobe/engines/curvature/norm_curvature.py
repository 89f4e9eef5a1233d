"""Second derivatives of normalisation layers in closed form, found in the autograd graph.

A norm maps x [..., D] to x̂ = r x with r = (mean x² + ε)^(−1/2); a LayerNorm centres x first. For a
cotangent g at x̂, centred for a LayerNorm, the second derivative of gᵀx̂ in x is, with s = gᵀx̂,
ĝ = g − 3s/(2D) x̂ and P the projection that centres (the identity for RMSNorm),

    Q = −(r²/D) (x̂ĝᵀ + ĝx̂ᵀ + s P).

See docs/theory.md, "Curvature propagation".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
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
        is_narrow: Whether x is in float16, whose range its second derivatives leave.
    """

    x_hat: Tensor
    rate: Tensor
    weight: Tensor | None
    dims: tuple[int, ...]
    is_narrow: bool


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
    norms, dependent = [], set(nodes)
    for node in nodes:
        norm = _layer_norm(node, dependent) or _rms_norm(node)
        if norm is None or not _is_as_written(norm):
            continue
        inner = norm.members - {node}
        if all(consumers[member] <= norm.members for member in inner):
            norms.append(norm)
    return norms


def curvature_along(norm: NormNode, cotangent: Tensor, direction: Tensor) -> Tensor:
    """Return Q u.

    Args:
        norm: The norm.
        cotangent: The cotangent at its output.
        direction: u, of the shape of x.
    """
    values = _normalised(norm)
    s, g = _projections(values, cotangent, centred=norm.centred)
    u, x_hat, dims = direction.to(g.dtype), values.x_hat, values.dims
    if norm.centred:
        u = u - u.mean(dims, keepdim=True)
    outer = x_hat * (g * u).sum(dims, keepdim=True) + g * (x_hat * u).sum(dims, keepdim=True)
    width = math.prod(x_hat.shape[dim] for dim in dims)
    return (-values.rate.square() / width * (outer + s * u)).to(direction.dtype)


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
    x_hat, dims = values.x_hat, values.dims
    s, g = _projections(values, cotangent, centred=norm.centred)
    c = -values.rate.square() / math.prod(x_hat.shape[dim] for dim in dims)
    beta = (_norm(g, dims) / _norm(x_hat, dims)).sqrt()
    w = signs("entries", x_hat)
    if norm.centred:
        w = w - w.mean(dims, keepdim=True)
    w = (c * s).abs().sqrt() * w
    outer = signs("positions", s) * (2 * c.abs()).sqrt()
    a = outer * beta * x_hat + w
    b = (c * s).sign() * w - outer * g / beta
    return a.to(cotangent.dtype), b.to(cotangent.dtype)


def _projections(values: _Normalised, cotangent: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return s and ĝ of a cotangent at a norm's output."""
    x_hat, dims = values.x_hat, values.dims
    g = cotangent.to(x_hat.dtype)
    if values.weight is not None:
        g = g * values.weight.to(g.dtype)
    if centred:
        g = g - g.mean(dims, keepdim=True)
    s = (g * x_hat).sum(dims, keepdim=True)
    return s, g - 1.5 * s / math.prod(x_hat.shape[dim] for dim in dims) * x_hat


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.square().sum(dims, keepdim=True).sqrt().clamp(min=_TINY)


def _layer_norm(node: Any, depends: Container[Any]) -> NormNode | None:
    """The norm that ``node`` computes, if its weight and bias do not depend on a recorded call."""
    if node.name() != "NativeLayerNormBackward0":
        return None
    entry, *affine = node.next_functions
    if entry[0] is None or any(argument in depends for argument, _ in affine):
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
            (inner, _), *constants = inner.next_functions
            if any(constant is not None for constant, _ in constants):
                continue
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


def _is_as_written(norm: NormNode) -> bool:
    """Whether x̂ and r can be computed again and are those of a norm, not in float16."""
    try:
        values = _normalised(norm)
    except (RuntimeError, AttributeError):  # overwritten in place, or freed
        return False
    x_hat, rate, dims = values.x_hat, values.rate, values.dims
    expected = [1 if d - x_hat.dim() in dims else n for d, n in enumerate(x_hat.shape)]
    return list(rate.shape) == expected and not values.is_narrow


def _normalised(norm: NormNode) -> _Normalised:
    """x̂ and r, in at least float32, from what the operations keep for their backward."""
    node = norm.node
    if norm.centred:
        dims = tuple(range(-len(node._saved_normalized_shape), 0))
        x, rate = node._saved_input.detach(), _wide(node._saved_result2.detach())
        x_hat = (_wide(x).to(rate.dtype) - node._saved_result1.detach()) * rate
        weight = node._saved_weight
        return _Normalised(
            x_hat=x_hat,
            rate=rate,
            weight=None if weight is None else weight.detach(),
            dims=dims,
            is_narrow=x.dtype == torch.float16,
        )
    x, rate = node._saved_self.detach(), node._saved_other.detach()
    if node.next_functions[0][0].name() == "RsqrtBackward0":
        x, rate = rate, x
    return _Normalised(
        x_hat=_wide(x) * _wide(rate),
        rate=_wide(rate),
        weight=None,
        dims=(-1,),
        is_narrow=x.dtype == torch.float16,
    )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
