"""A copy of the model for one measurement, in memory of its own.

Everything that the probe does, it does to the twin. Design, and what was weighed for it:

*A copy, and not the model itself.* A forward changes more than tensors: counters, caches, lists
that hooks fill, the flags of modes. Run often on the user's modules, each of these would have to be
restored exactly, while other threads may use them. A copy isolates all of them at once.

*No shared memory.* Parameters were shared once, to save memory. But ``train()``, ``eval()``, hooks
and the forward itself write parameters (loralib, RWKV, ``weight.data.div_``), some of them unseen
by version counters. Copy-on-write memory is no way out: it changes the address of the user's
parameter when either side is written, which breaks recorded CUDA graphs. A copy of the trainable
parameters costs less memory than their gradients, and about as much time as reading them once.
Frozen parameters are shared only where they are larger than ``LARGE_FROZEN_BYTES``, and no longer
once a write to one of them was seen.

*What a copy must follow.* ``copy.deepcopy`` stops at functions, weak references and tensors with a
graph. :class:`~fimprobe.model.copies.model_copies.ModelCopier` rebuilds closures, methods, partial
functions and weak references around the copied modules, keeps views of parameters as views, and
shares what cannot be copied. Forward hooks belong to the model's function and run in the copy, as
copies: lists and counters in their closures are not the user's. Backward hooks and hooks of tensors
observe or change gradients, not the function, and stay behind; so do hooks of fimprobe and
``torch.distributed``.

*Modes.* ``module.training`` is set on the copies; no override of ``train()`` or ``eval()`` runs.
What an override does beyond that (merging adapters, swapping averaged weights in) prepares for
inference; the information that is measured is that of the weights that are trained.

*Trust.* Nothing of this is believed. :func:`~fimprobe.model.checked_twin.make_checked_twin`
compares the twin with the user's own modules before the first measurement and whenever the model
has changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fimprobe.errors import FimprobeError
from fimprobe.model.copies.model_copies import ModelCopier

LARGE_FROZEN_BYTES = 512 * 2**20
"""Frozen parameters above this share the user's memory; the default of ``memory_mb``."""


@dataclass(kw_only=True)
class TwinSettings:
    """Settings that make the twin of a model, learned by :mod:`fimprobe.model.checked_twin`.

    Attributes:
        training_modules: Paths of modules that stay in training mode.
        copies_inputs: Whether the forward overwrites its inputs, so that each gets a copy of them.
        resets_state: Whether the forward changes its own function, so that each begins from the
            same state.
        shares_frozen: Whether large frozen parameters share the user's memory.
        adjusts_foreign_classes: Whether an option ``inplace`` is switched off, and Accelerate's
            autocast taken off, in classes that are not torch's.
        draws_random: Whether the forward draws random numbers by torch.
        draws_from_host: Whether it draws from the global streams of Python or numpy.
        fingerprint: Of the model that the settings were found with; None before.
        notes: Sentences for the report.
    """

    training_modules: frozenset[str] = frozenset()
    copies_inputs: bool = False
    resets_state: bool = False
    shares_frozen: bool = True
    adjusts_foreign_classes: bool = True
    draws_random: bool = False
    draws_from_host: bool = False
    fingerprint: int | None = None
    notes: tuple[str, ...] = ()


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


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each once; wrappers' prefixes left out."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad
    }


def make_twin(model: nn.Module, settings: TwinSettings | None = None) -> nn.Module:
    """Return a copy in eval mode with parameters, buffers, attributes and forward hooks of its own.

    ``inplace`` is off, as are caches for generation.

    Args:
        model: The user's model; it is read only.
        settings: What is known about it.

    Raises:
        FimprobeError: If a lazy layer has no parameters yet.

    >>> net = nn.Linear(2, 1)
    >>> twin = make_twin(net)
    >>> twin.weight.data_ptr() == net.weight.data_ptr(), twin.training
    (False, False)
    """
    return copy_twin(model, settings or TwinSettings())[0]


def copy_twin(
    model: nn.Module,
    settings: TwinSettings,
    memo: dict[int, Any] | None = None,
    shells: Sequence[nn.Module] = (),
) -> tuple[nn.Module, ModelCopier]:
    """Return the twin, and the copier that made it.

    Args:
        model: The user's model.
        settings: How the twin is made.
        memo: Copies made before (of parameters), by the identity of the original.
        shells: Modules whose copies in ``memo`` are still empty; they are filled.
    """
    model = unwrap(model)
    copier = ModelCopier(model, {} if memo is None else memo)
    if settings.shares_frozen:
        _share_large_frozen(model, copier)
    for module in shells:
        copier.fill(copier.memo[id(module)], module, "__composable_api")  # FSDP's own state
    twin = copier.copy(model)
    for module in copier.modules:
        keep_padded_positions(module)
    _set_modes(twin, copier.modules, settings.training_modules)
    for module in copier.modules:
        _adjust(module, foreign=settings.adjusts_foreign_classes)
    before: list[Callable[..., Any]] = []
    if settings.resets_state:
        before.append(StateReset(twin))
    if settings.copies_inputs:
        before.append(_copy_inputs)
    for hook in before:
        twin.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    return twin, copier


def _share_large_frozen(model: nn.Module, copier: ModelCopier) -> None:
    frozen = [p for p in model.parameters() if not p.requires_grad and type(p) is nn.Parameter]
    if sum(p.numel() * p.element_size() for p in frozen) > LARGE_FROZEN_BYTES:
        for parameter in frozen:
            copier.share_storage(parameter.detach())


def _set_modes(
    twin: nn.Module, modules: Sequence[nn.Module], training_modules: frozenset[str]
) -> None:
    """Set the flags; what a class does in its own ``train()`` or ``eval()`` is left out."""
    for module in modules:
        module.__dict__["training"] = False
    if training_modules:
        for path, module in twin.named_modules():
            if path in training_modules:
                module.__dict__["training"] = True


def _adjust(module: nn.Module, *, foreign: bool) -> None:
    """Switch off what the engines cannot work with and what does not change the function."""
    attributes = module.__dict__
    if attributes.get("inplace") is True and (foreign or _is_of_torch(module)):
        attributes["inplace"] = False
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and _has_torch_forward(module):
        module.sparse = module.scale_grad_by_freq = False
    if foreign:
        take_autocast_off(module)
    switch_cache_off(module)
    attributes["_fimprobe_altered_call"] = "forward" in attributes or bool(module._forward_hooks)
    _differentiable_weight_norm(module)
    attributes["_apply"] = functools.partial(_guarded_apply, module)


def take_autocast_off(module: nn.Module) -> None:
    """Undo ``Accelerator.prepare``: a model is measured in full precision."""
    attributes = module.__dict__
    if "_original_forward" in attributes and "accelerate" in sys.modules:
        attributes["forward"] = attributes["_original_forward"]


def switch_cache_off(module: nn.Module) -> None:
    """Let transformers not store keys and values: a fallback would read those of another pass."""
    config: Any = module.__dict__.get("config")
    kinds = {kind.__name__ for kind in type(config).__mro__}
    is_of_transformers = bool(kinds & {"PreTrainedConfig", "PretrainedConfig"})
    if is_of_transformers and getattr(config, "use_cache", False) is True:
        config.use_cache = False


def keep_padded_positions(module: nn.Module) -> None:
    """Let a transformer encoder in training mode compute padded positions in eval mode too.

    In eval mode, torch's encoder skips them and returns zeros there if it is frozen.
    """
    if isinstance(module, nn.TransformerEncoder) and any(x.training for x in module.layers):
        module.__dict__["use_nested_tensor"] = False


def has_altered_call(module: nn.Module) -> bool:
    """Return whether a twin's module returns something else than the ``forward`` of its class."""
    return bool(module.__dict__.get("_fimprobe_altered_call", False))


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _has_torch_forward(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn.")


def _guarded_apply(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``Module._apply``, behind ``to()``, ``half()`` and others, which ends the process under
    ``vmap``.

    It sets ``parameter.data`` to a tensor that dies with the transformation (torch 2.13).
    """
    refuse_data_swap()
    applied: nn.Module = type(module)._apply(module, *args, **kwargs)
    return applied


def refuse_data_swap() -> None:
    """Raise inside of a transformation of ``torch.func``.

    Raises:
        FimprobeError: There, before any damage.
    """
    if is_transformed():
        raise FimprobeError(
            "the forward converts a module (`to`, `half`, ...) or replaces a tensor's data, which "
            "cannot be vectorized"
        )


def is_transformed() -> bool:
    """Return whether the code runs inside of a transformation of ``torch.func``, such as ``vmap``."""
    return torch._C._functorch.maybe_current_level() is not None


def _differentiable_weight_norm(module: Any) -> None:
    """Write weight norm out: torch's fused kernel has a wrong second derivative in v (torch 2.13)."""

    def weight(g: Tensor, v: Tensor, dim: int) -> Tensor:
        """Return the weight g v/‖v‖.

        Args:
            g: The scale, of a shape that broadcasts to that of ``v``.
            v: The direction [...].
            dim: The dimension that keeps one norm per slice; −1 for one norm of all entries.

        Returns:
            The weight, of the shape of ``v``.
        """
        if dim == -1:
            return v * (g / v.square().sum().sqrt())
        others = [d for d in range(v.dim()) if d != dim % v.dim()]
        return v * (g / v.square().sum(others, keepdim=True).sqrt())

    if type(module).__name__ == "_WeightNorm" and hasattr(module, "dim"):
        dim = -1 if module.dim is None else module.dim
        module.forward = lambda g, v: weight(g, v, dim)
    for hook in module.__dict__.get("_forward_pre_hooks", {}).values():
        if type(hook).__name__ == "WeightNorm" and hasattr(hook, "compute_weight"):
            name, dim = hook.name, hook.dim
            hook.compute_weight = lambda m, name=name, dim=dim: weight(
                getattr(m, name + "_g"), getattr(m, name + "_v"), dim
            )


def _copy_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A forward pre-hook: the forward gets inputs that it may overwrite."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))


class StateReset:
    """A forward pre-hook that gives the model the tensors and numbers of its beginning.

    Tensors are written through ``.data``: graphs of earlier passes keep working, since the pass that
    begins now writes the same values again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [
            (tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())
        ]
        self._numbers = [
            (module, name, value)
            for module in model.modules()
            for name, value in module.__dict__.items()
            if type(value) in (bool, int, float, type(None)) and name != "training"
        ]

    def __call__(self, *call: Any) -> None:
        """Restore everything."""
        for tensor, value in self._tensors:
            tensor.data.copy_(value)
        for module, name, value in self._numbers:
            module.__dict__[name] = value
