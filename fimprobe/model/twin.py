"""A copy of the model that shares the parameters' storage and nothing else.

Everything the probe does, it does to the twin: hooks, gradients, modes and in-place layers of the
user's model stay as they are. It is made anew for each measurement, so it is never out of date.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.errors import FimprobeError

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_NO_STATE = {*_HOOKS, "_parameters", "_modules"}
_ATOMS = {type(None), bool, int, float, complex, str, bytes, type}
_CONTAINERS = {dict, OrderedDict, set, list}


def unwrap(wrapped: nn.Module) -> nn.Module:
    """The module behind ``torch.compile`` and (distributed) data parallel wrappers."""
    model: Any = wrapped
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model  # type: ignore[no-any-return]


def make_twin(
    model: nn.Module, memo: dict[int, Any] | None = None, shells: Sequence[nn.Module] = ()
) -> nn.Module:
    """A copy in eval mode: parameters share storage, buffers are copied, hooks left behind.

    Hooks of ``torch.nn.utils`` (weight and spectral norm, pruning) compute the layer's weight and
    come along. ``inplace`` is off everywhere, as are caches for generation; embeddings with
    ``max_norm`` (which rewrite their weight in the forward) get a weight of their own. ``memo`` names
    copies that were made before (of parameters, by id); those of ``shells`` are still empty and get
    their modules' contents.

    >>> net = nn.Linear(2, 1)
    >>> twin = make_twin(net)
    >>> twin.weight.data_ptr() == net.weight.data_ptr(), twin.training
    (True, False)
    """
    model = unwrap(model)
    memo = {} if memo is None else memo
    compiled = []
    module: Any
    for module in model.modules():
        if module is not model and "_orig_mod" in {**module.__dict__, **module._modules}:
            compiled.append(module)
        renorms = _has(module, "max_norm") is not None
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise FimprobeError(
                    f"the model has a lazy layer {type(module).__name__} that has seen no input; "
                    "run one forward pass first"
                )
            if id(parameter) not in memo or renorms:
                data = parameter.detach().clone() if renorms else parameter.detach()
                memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
        for name in _HOOKS:
            hooks = module.__dict__.get(name)
            if hooks:
                memo[id(hooks)] = OrderedDict(
                    (k, copy.deepcopy(hook))
                    for k, hook in hooks.items()
                    if name == "_forward_pre_hooks"
                    and type(hook).__module__.startswith("torch.nn.utils")
                )
        # tensors that a forward left on the module belong to a graph and cannot be copied
        for name, value in module.__dict__.items():
            if name in _NO_STATE or not isinstance(value, (Tensor, list, tuple, dict)):
                continue
            if isinstance(value, Tensor) or value:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor) and not leaf.is_leaf:
                        memo[id(leaf)] = leaf.detach().clone()
    for module in compiled:
        memo[id(module)] = _copied(module._orig_mod, memo)
    for module in shells:
        for key, value in module.__dict__.items():
            if not key.startswith("__composable_api"):  # FSDP's state
                memo[id(module)].__dict__[key] = copy.deepcopy(value, memo)
    twin = _copied(model, memo)
    for module in twin.modules():
        if (
            "_original_forward" in module.__dict__
        ):  # Accelerate's autocast: measured in full precision
            module.forward = module._original_forward
        _differentiable_weight_norm(module)
        if _has(module, "inplace") is True:
            module.inplace = False
        config: Any = module.__dict__.get("config")
        if getattr(config, "use_cache", False) is True:  # a replay would meet what a pass stored
            config.use_cache = False
        if _has(module, "scale_grad_by_freq"):
            module.scale_grad_by_freq = False
        if _has(module, "sparse") is True:
            module.sparse = False
    return twin.eval()


def _has(module: nn.Module, name: str) -> Any:
    """An attribute that is no tensor and no module; asking for one that is missing costs little."""
    found = module.__dict__.get(name, _MISSING)
    return getattr(type(module), name, None) if found is _MISSING else found


_MISSING = object()


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy`` makes of a module, without its price for dozens of empty containers."""
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    kind: Any = type(module)
    if not _plainly_copied(kind):
        return copy.deepcopy(module, memo)
    twin = memo[id(module)] = kind.__new__(kind)
    kept: Any = kind.__getstate__(module)
    twin.__setstate__(
        {k: v if type(v) in _ATOMS else _copied_value(v, memo) for k, v in kept.items()}
    )
    return twin  # type: ignore[no-any-return]


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    kind: Any = type(value)
    if kind in _CONTAINERS and not value:
        found = memo[id(value)] = kind()
        return found
    if isinstance(value, nn.Module):
        return _copied(value, memo)
    if kind is dict and _ATOMS.issuperset(map(type, value)):
        found = memo[id(value)] = {}
        for k, v in value.items():
            found[k] = v if type(v) in _ATOMS else _copied_value(v, memo)
        return found
    return copy.deepcopy(value, memo)


@functools.cache
def _plainly_copied(kind: Any) -> bool:
    """Whether ``copy.deepcopy`` makes an empty object and gives it a copy of its attributes."""
    plain = ("__reduce_ex__", "__reduce__", "__new__")
    return (
        all(getattr(kind, name) is getattr(object, name) for name in plain)
        and kind.__getstate__ is nn.Module.__getstate__
        and not any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__"))
        and not hasattr(kind, "__getnewargs_ex__")
        and not any("__slots__" in base.__dict__ for base in kind.__mro__)
        and kind not in copyreg.dispatch_table
    )


def _differentiable_weight_norm(module: Any) -> None:
    """Write weight norm out: torch's fused kernel has a wrong second derivative in v (torch 2.13)."""

    def weight(g: Tensor, v: Tensor, dim: int) -> Tensor:
        if dim == -1:
            return v * (g / v.square().sum().sqrt())
        others = [d for d in range(v.dim()) if d != dim % v.dim()]
        return v * (g / v.square().sum(others, keepdim=True).sqrt())

    if type(module).__name__ == "_WeightNorm" and hasattr(module, "dim"):
        dim = -1 if module.dim is None else module.dim
        module.forward = lambda g, v: weight(g, v, dim)
    for hook in getattr(module, "_forward_pre_hooks", {}).values():
        if type(hook).__name__ == "WeightNorm" and hasattr(hook, "compute_weight"):
            name, dim = hook.name, hook.dim
            hook.compute_weight = lambda m, name=name, dim=dim: weight(
                getattr(m, name + "_g"), getattr(m, name + "_v"), dim
            )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each once; wrappers' prefixes left out."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad
    }
