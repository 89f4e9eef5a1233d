"""The modules of the verified domain, each with its ``Derivatives`` from BackPACK or from here."""

from __future__ import annotations

from typing import Any

from backpack.core.derivatives.adaptive_avg_pool_nd import (
    AdaptiveAvgPool1dDerivatives,
    AdaptiveAvgPool2dDerivatives,
    AdaptiveAvgPool3dDerivatives,
)
from backpack.core.derivatives.avgpool1d import AvgPool1DDerivatives
from backpack.core.derivatives.avgpool2d import AvgPool2DDerivatives
from backpack.core.derivatives.avgpool3d import AvgPool3DDerivatives
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.conv1d import Conv1DDerivatives
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.core.derivatives.conv3d import Conv3DDerivatives
from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
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
from torch import nn

from fimprobe.engines.backpack.activations import (
    ClosedFormDerivatives,
    IdentityDerivatives,
    PReLUDerivatives,
    gelu_derivatives,
    log_sigmoid_derivatives,
    mish_derivatives,
    silu_derivatives,
    softplus_derivatives,
)
from fimprobe.engines.backpack.embedding import LookupDerivatives
from fimprobe.engines.backpack.normalisation import NormDerivatives

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
"""Modules with parameters: their derivatives and the names of the parameters, for both orders."""

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
    nn.LogSigmoid: ClosedFormDerivatives(log_sigmoid_derivatives),
    nn.GELU: ClosedFormDerivatives(gelu_derivatives),
    nn.SiLU: ClosedFormDerivatives(silu_derivatives),
    nn.Softplus: ClosedFormDerivatives(softplus_derivatives),
    nn.Mish: ClosedFormDerivatives(mish_derivatives),
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
"""Modules without parameters, through which second derivatives are propagated."""


def derivatives_of(module: nn.Module) -> Any:
    """The ``Derivatives`` of a module inside the domain."""
    return LAYERS[type(module)][0] if type(module) in LAYERS else PLAIN[type(module)]


def trainable_modules(twin: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that own trainable parameters, with their paths."""
    return [
        (path, module)
        for path, module in twin.named_modules()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    ]
