"""Which modules are inside the verified domain, by their class and options alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fimprobe.engines.backpack.derivatives import LAYERS, PLAIN


def module_reason(module: Any, *, second_order: bool) -> str | None:
    """Why the class or the options of a module are outside of the verified domain.

    Args:
        module: Any module of the twin.
        second_order: Whether exact second derivatives are requested, for which modules without
            parameters need a rule too.

    Returns:
        The reason; None inside of the domain.
    """
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
    option = next((check(module) for family, check in _CHECKS if isinstance(module, family)), None)
    return f"{name}{option}" if option else None


def _conv_option(module: Any) -> str | None:
    if isinstance(module.padding, str):
        return f"(padding={module.padding!r})"
    if module.padding_mode != "zeros":
        return f"(padding_mode={module.padding_mode!r})"
    return f"(output_padding={module.output_padding})" if any(module.output_padding) else None


def _average_pool_option(module: Any) -> str | None:
    if module.ceil_mode or not module.count_include_pad:
        return " with ceil_mode or without count_include_pad"
    divisor = getattr(module, "divisor_override", None)
    return f"(divisor_override={divisor})" if divisor is not None else None


def _max_pool_option(module: Any) -> str | None:
    return "(return_indices=True)" if module.return_indices else None


def _dropout_option(module: Any) -> str | None:
    return " in train mode" if module.training else None


def _batch_norm_option(module: Any) -> str | None:
    return None if module.affine else "(affine=False)"


def _instance_norm_option(module: Any) -> str | None:
    return None if module.running_mean is None else "(track_running_stats=True)"


def _embedding_option(module: Any) -> str | None:
    unusual = module.max_norm is not None or module.sparse
    return " with max_norm or sparse gradients" if unusual else None


def _zero_pad_option(module: Any) -> str | None:
    return " with negative padding" if min(module.padding) < 0 else None


_CHECKS: list[tuple[type[nn.Module], Callable[[Any], str | None]]] = [
    (nn.modules.conv._ConvNd, _conv_option),
    (nn.modules.pooling._AvgPoolNd, _average_pool_option),
    (nn.modules.pooling._MaxPoolNd, _max_pool_option),
    (nn.modules.dropout._DropoutNd, _dropout_option),
    (nn.modules.instancenorm._InstanceNorm, _instance_norm_option),
    (nn.modules.batchnorm._BatchNorm, _batch_norm_option),
    (nn.Embedding, _embedding_option),
    (nn.ZeroPad2d, _zero_pad_option),
]
"""For each family of modules, the option with which BackPACK is wrong or raises an error."""
