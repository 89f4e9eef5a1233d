"""Second-order BackPACK extensions for all modules of the domain, from any curvature at the outputs.

With the V axis first, a factor M [V, N, *] represents the curvature Σ_v M_v M_vᵀ of each sample.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from backpack.extensions import BatchDiagGGNExact, BatchDiagHessian
from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from fimprobe.engines.backpack.derivatives import LAYERS, PLAIN
from fimprobe.engines.backpack.normalisation import NormDerivatives

MAX_STACK_ELEMENTS = 2**22
"""Entries of a stack of per-sample gradients that is formed at once: 16 MB in float32."""


class LinearLoss(nn.modules.loss._Loss):
    """Σ v∘h: a loss with the gradient v at the outputs, and without curvature of its own."""

    def __init__(self) -> None:
        super().__init__(reduction="sum")
        self.cotangents = torch.zeros(())
        self.factors: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """The sum of the outputs times their cotangents."""
        return (self.cotangents * h).sum()


def hessian_extension() -> Any:
    """``BatchDiagHessian`` with all rules of ``LAYERS`` and ``PLAIN``; saves to ``diag_h_batch``."""
    return _with_rules(BatchDiagHessian(), _HessianRule, _ZeroCurvature())


def ggn_extension() -> Any:
    """``BatchDiagGGNExact`` with the same rules; saves to ``diag_ggn_exact_batch``."""
    return _with_rules(BatchDiagGGNExact(), _SquareRule, _FactoredCurvature())


def _with_rules(extension: Any, rule: type[_SquareRule], at_outputs: Any) -> Any:
    """Replace an extension's rules: ``rule`` for every module, ``at_outputs`` for the loss."""
    for kind, (derivatives, params) in LAYERS.items():
        extension.set_module_extension(kind, rule(derivatives, params), overwrite=True)
    for kind, derivatives in PLAIN.items():
        extension.set_module_extension(kind, rule(derivatives), overwrite=True)
    extension.set_module_extension(LinearLoss, at_outputs)
    return extension


class _ZeroCurvature(ModuleExtension):
    """No curvature at the outputs: all of it comes from the residuals of the modules."""

    def backpropagate(self, ext, module, g_inp, g_out, backproped):
        """Start without any factor, since the outputs have no curvature."""
        return {"matrices": [], "signs": []}


class _FactoredCurvature(ModuleExtension):
    """Curvature at the outputs given by the factors [V, N, *] of the loss."""

    def backpropagate(self, ext, module, g_inp, g_out, backproped):
        """Start from the rows s_v [V, N, *] whose Σ_v s_v s_vᵀ is the curvature at the outputs."""
        return module.factors


class _SquareRule(MatToJacMat):
    """Per-sample diagonal of JᵀM MᵀJ for a parameter: Σ_v (Jᵀ M_v)² [N, *parameter]."""

    def __init__(self, derivatives: Any, params: tuple[str, ...] = ()) -> None:
        for name in params:
            setattr(self, name, partial(self._diagonal, name))
        super().__init__(derivatives, params=list(params))

    def _diagonal(self, name, ext, module, g_inp, g_out, backproped):
        return self._squares(name, module, backproped)

    def _squares(self, name: str, module: Any, matrix: Tensor) -> Tensor:
        """Σ_v (Jᵀ M_v)² [N, *parameter] of a factor M [V, N, *output]."""
        parameter = getattr(module, name)
        total = parameter.new_zeros((module.output.shape[0], *parameter.shape))
        step = max(1, MAX_STACK_ELEMENTS // max(1, total.numel()))
        for rows in matrix.split(step):
            product = self.derivatives.param_mjp(name, module, None, None, rows, sum_batch=False)
            total += product.square().sum(0)
        return total


class _HessianRule(_SquareRule):
    """Per-sample diagonal where the Hessian at a module's output is Σ_i ±M_i M_iᵀ.

    The module is linear in its parameters. Its own residual adds factors at its input.
    """

    def _diagonal(self, name, ext, module, g_inp, g_out, backproped):
        parameter = getattr(module, name)
        total = parameter.new_zeros((module.output.shape[0], *parameter.shape))
        for matrix, sign in zip(backproped["matrices"], backproped["signs"], strict=True):
            total = total + sign * self._squares(name, module, matrix)
        return total

    def backpropagate(self, ext, module, g_inp, g_out, backproped):
        """Propagate every factor [V, N, *], and add those of the residual, one for each sign."""
        matrices = super().backpropagate(ext, module, g_inp, g_out, backproped["matrices"])
        signs = list(backproped["signs"])
        if not self.derivatives.hessian_is_zero(module):
            for sign in (1.0, -1.0):
                matrices.append(_residual_factor(self.derivatives, module, g_out[0], sign))
                signs.append(sign)
        return {"matrices": matrices, "signs": signs}


def _residual_factor(derivatives: Any, module: Any, delta: Tensor, sign: float) -> Tensor:
    """M [V, N, *input] with M Mᵀ the positive (sign = 1) or negative part of each residual."""
    shape = module.input0.shape
    if isinstance(derivatives, NormDerivatives):
        values, vectors = torch.linalg.eigh(derivatives.residual(module, delta))
        root = vectors * (sign * values).clamp(min=0).sqrt().unsqueeze(-2)
        return block_rows(root).reshape(-1, *shape)
    curvature = derivatives.d2f(module, None, None) * delta.detach()
    root = (sign * curvature).clamp(min=0).sqrt().reshape(shape[0], -1)
    return torch.diag_embed(root).transpose(0, 1).reshape(-1, *shape)


def block_rows(root: Tensor) -> Tensor:
    """Columns of the roots [N, K, D, D] of K blocks as rows [K·D, N, K, D], zero in other blocks.

    If r rᵀ is the curvature of a block, Σ_v s_v s_vᵀ over the rows is that of all blocks together.
    """
    samples, count, size = root.shape[:3]
    rows = root.new_zeros(count, size, samples, count, size)
    block = torch.arange(count, device=root.device)
    rows[block, :, :, block] = root.permute(1, 3, 0, 2)
    return rows.flatten(0, 1)
