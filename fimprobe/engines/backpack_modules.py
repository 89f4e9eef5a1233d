"""What BackPACK knows about modules, and what it lacks, in its own terms (``Derivatives`` classes).

With the V axis first, as BackPACK has it: ``jac_t_mat_prod`` takes M [V, N, *output] to Jᵀ M, and
``param_mjp(..., sum_batch=False)`` to per-sample gradients [V, N, *parameter]. A residual is the
matrix Σ_k δ_k ∂²f_k/∂x∂xᵀ of a module f at δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    from backpack.core.derivatives.adaptive_avg_pool_nd import (
        AdaptiveAvgPool1dDerivatives,
        AdaptiveAvgPool2dDerivatives,
        AdaptiveAvgPool3dDerivatives,
    )
    from backpack.core.derivatives.avgpool1d import AvgPool1DDerivatives
    from backpack.core.derivatives.avgpool2d import AvgPool2DDerivatives
    from backpack.core.derivatives.avgpool3d import AvgPool3DDerivatives
    from backpack.core.derivatives.basederivatives import BaseDerivatives, BaseParameterDerivatives
    from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
    from backpack.core.derivatives.conv1d import Conv1DDerivatives
    from backpack.core.derivatives.conv2d import Conv2DDerivatives
    from backpack.core.derivatives.conv3d import Conv3DDerivatives
    from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
    from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
    from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
    from backpack.core.derivatives.elementwise import ElementwiseDerivatives
    from backpack.core.derivatives.elu import ELUDerivatives
    from backpack.core.derivatives.flatten import FlattenDerivatives
    from backpack.core.derivatives.leakyrelu import LeakyReLUDerivatives
    from backpack.core.derivatives.linear import LinearDerivatives
    from backpack.core.derivatives.maxpool1d import MaxPool1DDerivatives
    from backpack.core.derivatives.maxpool2d import MaxPool2DDerivatives
    from backpack.core.derivatives.maxpool3d import MaxPool3DDerivatives
    from backpack.core.derivatives.relu import ReLUDerivatives
    from backpack.core.derivatives.selu import SELUDerivatives
    from backpack.core.derivatives.sigmoid import SigmoidDerivatives
    from backpack.core.derivatives.tanh import TanhDerivatives
    from backpack.core.derivatives.zeropad2d import ZeroPad2dDerivatives
    from backpack.extensions import BatchDiagGGNExact, BatchDiagHessian
    from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
    from backpack.extensions.module_extension import ModuleExtension
    from backpack.utils.subsampling import subsample
except ImportError as error:
    from fimprobe.types import FimprobeError

    raise FimprobeError(
        f"engine='backpack' needs BackPACK, which cannot be imported ({error}); "
        "pip install backpack-for-pytorch"
    ) from error

PIECE = 2**22
"""Most entries of a stack of per-sample gradients formed at once."""


class IdentityDerivatives(BaseDerivatives):  # type: ignore[misc]
    """f(x) = x: Identity, and every kind of Dropout in eval mode."""

    def hessian_is_zero(self, module: Any) -> bool:
        """f is linear."""
        return True

    def _jac_t_mat_prod(self, module, g_inp, g_out, mat, subsampling=None):  # type: ignore[no-untyped-def]
        return mat


class CurveDerivatives(ElementwiseDerivatives):  # type: ignore[misc]
    """An activation given by its first and second derivative, functions of (module, x)."""

    def __init__(self, curve: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.curve = curve

    def hessian_is_zero(self, module: Any) -> bool:
        """f'' ≠ 0."""
        return False

    def df(self, module, g_inp, g_out, subsampling=None):  # type: ignore[no-untyped-def]
        """f'(x)."""
        return self.curve(module, subsample(module.input0, subsampling=subsampling).detach())[0]

    def d2f(self, module, g_inp, g_out):  # type: ignore[no-untyped-def]
        """f''(x)."""
        return self.curve(module, module.input0.detach())[1]


def gelu_curve(module: nn.GELU, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = xΦ: f' = Φ + xφ, f'' = (2 − x²)φ; or f = x(1 + tanh u)/2, u = √(2/π)(x + 0.044715x³)."""
    if module.approximate == "none":
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density, (2 - x.square()) * density
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x.pow(3)))
    u1, u2 = c * (1 + 3 * a * x.square()), 6 * a * c * x
    slope = 1 - t.square()
    first = (1 + t) / 2 + x * slope * u1 / 2
    return first, slope * u1 + x / 2 * (slope * u2 - 2 * t * slope * u1.square())


def silu_curve(module: nn.SiLU, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = xs, s the sigmoid: f' = s + xs(1−s), f'' = s(1−s)(2 + x(1−2s))."""
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return s + x * s * rest, s * rest * (2 + x * (rest - s))


def softplus_curve(module: nn.Softplus, x: Tensor) -> tuple[Tensor, Tensor]:
    """f' = s(βx), f'' = βs(1−s); linear where βx exceeds the threshold."""
    z = module.beta * x
    linear = z > module.threshold
    first = torch.sigmoid(z).masked_fill(linear, 1)
    return first, (module.beta * torch.sigmoid(z) * torch.sigmoid(-z)).masked_fill(linear, 0)


def mish_curve(module: nn.Mish, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x tanh(softplus x), with t the tanh and s the sigmoid."""
    t, s = torch.tanh(nn.functional.softplus(x)), torch.sigmoid(x)
    slope = (1 - t.square()) * s
    return t + x * slope, slope * (2 + x * (torch.sigmoid(-x) - 2 * t * s))


def log_sigmoid_curve(module: nn.LogSigmoid, x: Tensor) -> tuple[Tensor, Tensor]:
    """f' = s(−x), f'' = −s(x)s(−x); BackPACK's own e^x overflows."""
    rest = torch.sigmoid(-x)
    return rest, -torch.sigmoid(x) * rest


class PReLUDerivatives(ElementwiseDerivatives, BaseParameterDerivatives):  # type: ignore[misc]
    """f(x) = max(x, 0) + w min(x, 0), w per channel or one for all."""

    def hessian_is_zero(self, module: Any) -> bool:
        """F is piecewise linear in x."""
        return True

    def df(self, module, g_inp, g_out, subsampling=None):  # type: ignore[no-untyped-def]
        """1 or w."""
        x = subsample(module.input0, subsampling=subsampling).detach()
        w = module.weight.detach()
        w = w.view(-1, *[1] * (x.dim() - 2)) if w.numel() > 1 else w
        return torch.where(x > 0, torch.ones_like(x), w)

    def _weight_jac_t_mat_prod(  # type: ignore[no-untyped-def]
        self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None
    ):
        x = subsample(module.input0, subsampling=subsampling).detach()
        product = mat * x.clamp(max=0)
        keep = 3 if module.weight.numel() > 1 else 2
        gradient = product.flatten(keep).sum(keep) if product.dim() > keep else product
        gradient = gradient if keep == 3 else gradient.unsqueeze(-1)
        return gradient.sum(1) if sum_batch else gradient


class LookupDerivatives(BaseParameterDerivatives):  # type: ignore[misc]
    """Embedding: G_vd = Σ_t [token_t = v] δ_td. BackPACK's own only knows the default dtype."""

    def hessian_is_zero(self, module: Any) -> bool:
        """The input is not differentiable."""
        return True

    def _weight_jac_t_mat_prod(  # type: ignore[no-untyped-def]
        self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None
    ):
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


class NormDerivatives(BaseParameterDerivatives):  # type: ignore[misc]
    """y = γ x̂ + β with x̂ = (x − μ)/σ over groups of D entries of a sample; RMSNorm has μ = 0.

    LayerNorm and RMSNorm: a group is a token. GroupNorm, InstanceNorm: a group of channels.
    """

    def hessian_is_zero(self, module: Any) -> bool:
        """F is curved."""
        return False

    def hessian_is_diagonal(self, module: Any) -> bool:
        """Entries of a group depend on each other."""
        return False

    def groups(self, module: Any, x: Tensor) -> Tensor:
        """X [..., N, *] as [..., N, K, D] for as many leading dimensions as x has above the input."""
        lead = x.dim() - module.input0.dim() + 1
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return x.reshape(*x.shape[:lead], -1, math.prod(module.normalized_shape))
        count = getattr(module, "num_groups", None) or module.input0.shape[1]
        return x.reshape(*x.shape[:lead], count, -1)

    def normalise(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """x̂ [N, K, D], σ [N, K, 1], and whether the mean was taken off."""
        x = self.groups(module, x.detach()) if x.dim() == module.input0.dim() else x
        centred = not isinstance(module, nn.RMSNorm)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        sigma = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x / sigma, sigma, centred

    def gain(self, module: Any, x: Tensor) -> Tensor:
        """γ δ for δ [..., N, *]."""
        weight = module.weight
        if weight is None:
            return x
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return x * weight.detach()
        return x * weight.detach().view(-1, *[1] * (module.input0.dim() - 2))

    def _jac_t_mat_prod(self, module, g_inp, g_out, mat, subsampling=None):  # type: ignore[no-untyped-def]
        xhat, sigma, centred = self.normalise(
            module, subsample(module.input0, subsampling=subsampling)
        )
        v = self.groups(module, self.gain(module, mat))
        a = v - xhat * (v * xhat).mean(-1, keepdim=True)
        if centred:
            a = a - v.mean(-1, keepdim=True)
        return (a / sigma).reshape(mat.shape)

    def residual(self, module: Any, delta: Tensor) -> Tensor:
        """Σ_k δ_k ∂²y_k/∂x∂xᵀ [N, K, D, D] of every group.

        With v = γδ, c = mean(v x̂), a = v − mean(v) − c x̂ and P = I − 11ᵀ/D (RMSNorm: no mean,
        P = I): σ² H = −(a x̂ᵀ + x̂ aᵀ)/D − c P + c x̂ x̂ᵀ/D.
        """
        xhat, sigma, centred = self.normalise(module, module.input0)
        v = self.groups(module, self.gain(module, delta.detach()))
        size = v.shape[-1]
        c = (v * xhat).mean(-1, keepdim=True)
        a = v - c * xhat
        projector = torch.eye(size, dtype=v.dtype, device=v.device)
        if centred:
            a = a - v.mean(-1, keepdim=True)
            projector = projector - 1 / size
        outer = (a - c * xhat / 2).unsqueeze(-1) * xhat.unsqueeze(-2) / size
        hessian = -(outer + outer.mT) - c.unsqueeze(-1) * projector
        return hessian / sigma.unsqueeze(-1).square()

    def _sum(self, module: Any, product: Tensor, sum_batch: bool) -> Tensor:
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            keep = len(module.normalized_shape)
            axes = list(range(2, product.dim() - keep))
        else:
            axes = list(range(3, product.dim()))
        product = product.sum(axes) if axes else product
        return product.sum(1) if sum_batch else product

    def _weight_jac_t_mat_prod(  # type: ignore[no-untyped-def]
        self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None
    ):
        x = subsample(module.input0, subsampling=subsampling)
        xhat = self.normalise(module, x)[0].reshape(x.shape)
        return self._sum(module, mat * xhat, sum_batch)

    def _bias_jac_t_mat_prod(  # type: ignore[no-untyped-def]
        self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None
    ):
        return self._sum(module, mat, sum_batch)


LAYERS: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.Linear: (LinearDerivatives(), ("weight", "bias")),
    nn.Conv1d: (Conv1DDerivatives(), ("weight", "bias")),
    nn.Conv2d: (Conv2DDerivatives(), ("weight", "bias")),
    nn.Conv3d: (Conv3DDerivatives(), ("weight", "bias")),
    nn.ConvTranspose1d: (ConvTranspose1DDerivatives(), ("weight", "bias")),
    nn.ConvTranspose2d: (ConvTranspose2DDerivatives(), ("weight", "bias")),
    nn.ConvTranspose3d: (ConvTranspose3DDerivatives(), ("weight", "bias")),
    nn.BatchNorm1d: (BatchNormNdDerivatives(), ("weight", "bias")),
    nn.BatchNorm2d: (BatchNormNdDerivatives(), ("weight", "bias")),
    nn.BatchNorm3d: (BatchNormNdDerivatives(), ("weight", "bias")),
    nn.LayerNorm: (NormDerivatives(), ("weight", "bias")),
    nn.GroupNorm: (NormDerivatives(), ("weight", "bias")),
    nn.InstanceNorm1d: (NormDerivatives(), ("weight", "bias")),
    nn.InstanceNorm2d: (NormDerivatives(), ("weight", "bias")),
    nn.InstanceNorm3d: (NormDerivatives(), ("weight", "bias")),
    nn.RMSNorm: (NormDerivatives(), ("weight",)),
    nn.PReLU: (PReLUDerivatives(), ("weight",)),
    nn.Embedding: (LookupDerivatives(), ("weight",)),
}
"""Modules with parameters: their derivatives and the parameters' names. First and second order."""

PLAIN: dict[type[nn.Module], Any] = {
    nn.Identity: IdentityDerivatives(),
    nn.Dropout: IdentityDerivatives(),
    nn.Dropout1d: IdentityDerivatives(),
    nn.Dropout2d: IdentityDerivatives(),
    nn.Dropout3d: IdentityDerivatives(),
    nn.AlphaDropout: IdentityDerivatives(),
    nn.FeatureAlphaDropout: IdentityDerivatives(),
    nn.Flatten: FlattenDerivatives(),
    nn.Unflatten: FlattenDerivatives(),
    nn.ReLU: ReLUDerivatives(),
    nn.LeakyReLU: LeakyReLUDerivatives(),
    nn.Sigmoid: SigmoidDerivatives(),
    nn.Tanh: TanhDerivatives(),
    nn.ELU: ELUDerivatives(),
    nn.SELU: SELUDerivatives(),
    nn.LogSigmoid: CurveDerivatives(log_sigmoid_curve),
    nn.GELU: CurveDerivatives(gelu_curve),
    nn.SiLU: CurveDerivatives(silu_curve),
    nn.Softplus: CurveDerivatives(softplus_curve),
    nn.Mish: CurveDerivatives(mish_curve),
    nn.MaxPool1d: MaxPool1DDerivatives(),
    nn.MaxPool2d: MaxPool2DDerivatives(),
    nn.MaxPool3d: MaxPool3DDerivatives(),
    nn.AvgPool1d: AvgPool1DDerivatives(),
    nn.AvgPool2d: AvgPool2DDerivatives(),
    nn.AvgPool3d: AvgPool3DDerivatives(),
    nn.AdaptiveAvgPool1d: AdaptiveAvgPool1dDerivatives(),
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2dDerivatives(),
    nn.AdaptiveAvgPool3d: AdaptiveAvgPool3dDerivatives(),
    nn.ZeroPad2d: ZeroPad2dDerivatives(),
}
"""Modules without parameters that the second order passes through."""


def derivatives_of(module: nn.Module) -> Any:
    """The Derivatives of a module inside the domain."""
    return LAYERS[type(module)][0] if type(module) in LAYERS else PLAIN[type(module)]


def module_reason(module: Any, *, second_order: bool) -> str | None:
    """Why a module's class or options are outside of what the tests verify; None inside."""
    kind = type(module)
    name = kind.__name__
    if kind not in LAYERS and not (second_order and kind in PLAIN):
        return f"{name} has no verified rule"
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return f"{name}'s forward is replaced or hooked"
    if kind in LAYERS:
        extra = {n for n, p in module._parameters.items() if p is not None} - set(LAYERS[kind][1])
        if extra:
            return f"{name} with the parameters {sorted(extra)}"
    if getattr(module, "inplace", False):
        return f"{name}(inplace=True)"
    if "Dropout" in name and module.training:
        return f"{name} in train mode"
    if name.startswith("Conv"):
        if isinstance(module.padding, str):
            return f"{name}(padding={module.padding!r})"
        if module.padding_mode != "zeros":
            return f"{name}(padding_mode={module.padding_mode!r})"
        if any(module.output_padding):
            return f"{name}(output_padding={module.output_padding})"
    if name.startswith("BatchNorm"):
        if module.training or module.running_mean is None:
            return f"{name} with the batch's statistics"
        if not module.affine:
            return f"{name}(affine=False)"
    if name.startswith("InstanceNorm") and module.running_mean is not None:
        return f"{name}(track_running_stats=True)"
    if name == "Embedding" and (module.max_norm is not None or module.sparse):
        return f"{name} with max_norm or sparse gradients"
    if name.startswith("MaxPool") and module.return_indices:
        return f"{name}(return_indices=True)"
    if name.startswith("AvgPool"):
        if module.ceil_mode or not module.count_include_pad:
            return f"{name} with ceil_mode or without count_include_pad"
        if getattr(module, "divisor_override", None) is not None:
            return f"{name}(divisor_override={module.divisor_override})"
    if name == "ZeroPad2d" and min(module.padding) < 0:
        return f"{name} with negative padding"
    return None


class Seeded(nn.modules.loss._Loss):
    """Σ seed∘h: a loss whose gradient at the outputs is the seed, and that is not curved."""

    def __init__(self, seed: Tensor, factors: Tensor | None = None) -> None:
        super().__init__(reduction="sum")
        self.seed, self.factors = seed, factors

    def forward(self, h: Tensor) -> Tensor:
        """The loss."""
        return (self.seed * h).sum()


class _FlatStart(ModuleExtension):  # type: ignore[misc]
    """No curvature at the outputs: all of it comes from the modules' residuals."""

    def backpropagate(self, ext, module, g_inp, g_out, backproped):  # type: ignore[no-untyped-def]
        """No factor yet."""
        return {"matrices": [], "signs": []}


class _FactorStart(ModuleExtension):  # type: ignore[misc]
    """Starts from the loss's own factors [V, N, *]."""

    def backpropagate(self, ext, module, g_inp, g_out, backproped):  # type: ignore[no-untyped-def]
        """Rows v of a matrix whose Σ_v s_v s_vᵀ is the curvature at the outputs."""
        return module.factors


class _SquareRule(MatToJacMat):  # type: ignore[misc]
    """Per-sample diagonal of JᵀM MᵀJ for a parameter: Σ_v (Jᵀ M_v)² [N, *parameter]."""

    def __init__(self, derivatives: Any, params: tuple[str, ...] = ()) -> None:
        for name in params:
            setattr(self, name, partial(self._diagonal, name))
        super().__init__(derivatives, params=list(params))

    def _diagonal(self, name, ext, module, g_inp, g_out, backproped):  # type: ignore[no-untyped-def]
        return self._squares(name, module, backproped)

    def _squares(self, name: str, module: Any, matrix: Tensor) -> Tensor:
        samples, parameter = module.output.shape[0], getattr(module, name)
        total = torch.zeros(
            (samples, *parameter.shape), dtype=parameter.dtype, device=parameter.device
        )
        step = max(1, PIECE // max(1, total.numel()))
        for part in matrix.split(step):
            product = self.derivatives.param_mjp(name, module, None, None, part, sum_batch=False)
            total += product.square().sum(0)
        return total


class _HessianRule(_SquareRule):
    """The same where the Hessian at a module's output is Σ_i ±M_i M_iᵀ.

    The module is linear in its parameters; its own residual adds factors on the way to its input.
    """

    def _diagonal(self, name, ext, module, g_inp, g_out, backproped):  # type: ignore[no-untyped-def]
        parameter = getattr(module, name)
        total = parameter.new_zeros((module.output.shape[0], *parameter.shape))
        for matrix, sign in zip(backproped["matrices"], backproped["signs"], strict=True):
            total = total + sign * self._squares(name, module, matrix)
        return total

    def backpropagate(self, ext, module, g_inp, g_out, backproped):  # type: ignore[no-untyped-def]
        """Jᵀ M of every factor, and the residual's own."""
        matrices = super().backpropagate(ext, module, g_inp, g_out, backproped["matrices"])
        signs = list(backproped["signs"])
        if not self.derivatives.hessian_is_zero(module):
            for sign in (1.0, -1.0):
                matrices.append(_residual_factor(self.derivatives, module, g_out[0], sign))
                signs.append(sign)
        return {"matrices": matrices, "signs": signs}


def _residual_factor(derivatives: Any, module: Any, delta: Tensor, sign: float) -> Tensor:
    """M [V, N, *input] with M Mᵀ the positive (negative) part of each sample's residual."""
    shape = module.input0.shape
    if isinstance(derivatives, NormDerivatives):
        values, vectors = torch.linalg.eigh(derivatives.residual(module, delta))
        root = vectors * (sign * values).clamp(min=0).sqrt().unsqueeze(-2)
        count, size = root.shape[1], root.shape[2]
        factor = root.new_zeros(count, size, shape[0], count, size)
        group = torch.arange(count, device=root.device)
        factor[group, :, :, group] = root.permute(1, 3, 0, 2)  # a group's vectors live in it
        return factor.reshape(count * size, *shape)
    curvature = derivatives.d2f(module, None, None) * delta.detach()
    root = (sign * curvature).clamp(min=0).sqrt().reshape(shape[0], -1)
    return torch.diag_embed(root).transpose(0, 1).reshape(-1, *shape)


def hessian_extension() -> Any:
    """BatchDiagHessian with all rules of ``LAYERS`` and ``PLAIN``; saves to ``diag_h_batch``."""
    return _with_rules(BatchDiagHessian(), _HessianRule, _FlatStart())


def ggn_extension() -> Any:
    """BatchDiagGGNExact likewise; saves to ``diag_ggn_exact_batch``."""
    return _with_rules(BatchDiagGGNExact(), _SquareRule, _FactorStart())


def _with_rules(extension: Any, rule: type[_SquareRule], start: Any) -> Any:
    for kind, (derivatives, params) in LAYERS.items():
        extension.set_module_extension(kind, rule(derivatives, params), overwrite=True)
    for kind, derivatives in PLAIN.items():
        extension.set_module_extension(kind, rule(derivatives), overwrite=True)
    extension.set_module_extension(Seeded, start)
    return extension
