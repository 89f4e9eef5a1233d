"""Derivatives of ``Embedding``, in place of BackPACK's, which assume the default dtype."""

from __future__ import annotations

from typing import Any

from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.utils.subsampling import subsample


class LookupDerivatives(BaseParameterDerivatives):
    """G_vd = Σ_t [token_t = v] δ_td."""

    def hessian_is_zero(self, module: Any) -> bool:
        """The input is not differentiable."""
        return True

    def _weight_jac_t_mat_prod(self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None):
        tokens = subsample(module.input0, subsampling=subsampling)
        samples = tokens.shape[0]
        tokens = tokens.reshape(samples, -1)
        width = module.weight.shape[1]
        rows = mat.reshape(mat.shape[0], samples, -1, width)
        if module.padding_idx is not None:
            rows = rows * (tokens != module.padding_idx)[..., None]
        gradient = mat.new_zeros(mat.shape[0], samples, *module.weight.shape)
        index = tokens[None, :, :, None].expand_as(rows)
        gradient.scatter_add_(2, index, rows)
        return gradient.sum(1) if sum_batch else gradient
