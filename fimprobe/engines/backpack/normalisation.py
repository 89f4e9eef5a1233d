"""Derivatives of normalisation layers within a sample, which BackPACK lacks.

The residual of a module f at δ is the matrix Σ_k δ_k ∂²f_k/∂x∂xᵀ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.utils.subsampling import subsample
from torch import Tensor, nn


class NormDerivatives(BaseParameterDerivatives):
    """y = γ x̂ + β with x̂ = (x − μ)/σ over groups of D entries of a sample; RMSNorm has μ = 0.

    A group is a token for LayerNorm and RMSNorm, some channels for GroupNorm and InstanceNorm.
    """

    def hessian_is_zero(self, module: Any) -> bool:
        """False: f is not linear in x."""
        return False

    def hessian_is_diagonal(self, module: Any) -> bool:
        """False: the entries of a group depend on each other."""
        return False

    def residual(self, module: Any, delta: Tensor) -> Tensor:
        """Σ_k δ_k ∂²y_k/∂x∂xᵀ of every group.

        With v = γδ, c = mean(v x̂), a = v − mean(v) − c x̂ and P = I − 11ᵀ/D (RMSNorm: no mean,
        P = I): σ² H = −(a x̂ᵀ + x̂ aᵀ)/D − c P + c x̂ x̂ᵀ/D.

        Args:
            module: The layer, whose inputs [N, *] BackPACK has kept.
            delta: Cotangents δ [N, *] at its output.

        Returns:
            The residuals [N, K, D, D] of K groups with D entries each.
        """
        xhat, sigma = _normalise(module, module.input0)
        v = _groups(module, _gain(module, delta.detach()))
        size = v.shape[-1]
        a, c = _tangent(module, v, xhat)
        projector = torch.eye(size, dtype=v.dtype, device=v.device)
        if _centred(module):
            projector = projector - 1 / size
        outer = (a - c * xhat / 2).unsqueeze(-1) * xhat.unsqueeze(-2) / size
        hessian = -(outer + outer.mT) - c.unsqueeze(-1) * projector
        return hessian / sigma.unsqueeze(-1).square()

    def _jac_t_mat_prod(self, module, g_inp, g_out, mat, subsampling=None):
        xhat, sigma = _normalise(module, subsample(module.input0, subsampling=subsampling))
        a, _ = _tangent(module, _groups(module, _gain(module, mat)), xhat)
        return (a / sigma).reshape(mat.shape)

    def _weight_jac_t_mat_prod(self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None):
        x = subsample(module.input0, subsampling=subsampling)
        xhat = _normalise(module, x)[0].reshape(x.shape)
        return _sum(module, mat * xhat, sum_batch)

    def _bias_jac_t_mat_prod(self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None):
        return _sum(module, mat, sum_batch)


def _by_token(module: Any) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def _centred(module: Any) -> bool:
    return not isinstance(module, nn.RMSNorm)


def _groups(module: Any, x: Tensor) -> Tensor:
    """Reshape x [..., N, *] to its K groups of D entries, [..., N, K, D]."""
    lead = x.dim() - module.input0.dim() + 1
    if _by_token(module):
        return x.reshape(*x.shape[:lead], -1, math.prod(module.normalized_shape))
    count = getattr(module, "num_groups", None) or module.input0.shape[1]
    return x.reshape(*x.shape[:lead], count, -1)


def _normalise(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x̂ [N, K, D] and σ [N, K, 1] of inputs [N, *]."""
    x = _groups(module, x.detach())
    if _centred(module):
        x = x - x.mean(-1, keepdim=True)
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    sigma = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x / sigma, sigma


def _gain(module: Any, x: Tensor) -> Tensor:
    """γ δ for δ [..., N, *]."""
    weight = module.weight
    if weight is None:
        return x
    if _by_token(module):
        return x * weight.detach()
    return x * weight.detach().view(-1, *[1] * (module.input0.dim() - 2))


def _tangent(module: Any, v: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    """The component a of v [..., N, K, D] that changes x̂, and c = mean(v x̂)."""
    c = (v * xhat).mean(-1, keepdim=True)
    a = v - c * xhat
    return (a - v.mean(-1, keepdim=True) if _centred(module) else a), c


def _sum(module: Any, product: Tensor, sum_batch: bool) -> Tensor:
    """Sum [V, N, *] over the positions that share an entry of γ or β, and over N if ``sum_batch``."""
    if _by_token(module):
        axes = range(2, product.dim() - len(module.normalized_shape))
    else:
        axes = range(3, product.dim())
    product = product.sum(list(axes)) if axes else product
    return product.sum(1) if sum_batch else product
