"""Which modules are inside the verified domain, by their class and options alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from fimprobe.engines.backpack.derivatives import LAYERS, PLAIN


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
    told = _wrong_option(module)
    return told and f"{name}{told}"


def _wrong_option(module: Any) -> str | None:
    """The option, of a module of a known class, with which BackPACK is wrong or refuses."""
    if getattr(module, "inplace", False):
        return "(inplace=True)"
    if isinstance(module, nn.modules.conv._ConvNd):
        if isinstance(module.padding, str):
            return f"(padding={module.padding!r})"
        if module.padding_mode != "zeros":
            return f"(padding_mode={module.padding_mode!r})"
        if any(module.output_padding):
            return f"(output_padding={module.output_padding})"
    if isinstance(module, nn.modules.pooling._AvgPoolNd):
        if module.ceil_mode or not module.count_include_pad:
            return " with ceil_mode or without count_include_pad"
        if getattr(module, "divisor_override", None) is not None:
            return f"(divisor_override={module.divisor_override})"
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training:
        return " in train mode"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine:
        return "(affine=False)"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.running_mean is not None:
        return "(track_running_stats=True)"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return " with max_norm or sparse gradients"
    if isinstance(module, nn.modules.pooling._MaxPoolNd) and module.return_indices:
        return "(return_indices=True)"
    if isinstance(module, nn.ZeroPad2d) and min(module.padding) < 0:
        return " with negative padding"
    return None
