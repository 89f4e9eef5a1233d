"""Copies of a model's modules and tensors, which share no memory with the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fimprobe.errors import FimprobeError
from fimprobe.model.copies.copy_traits import ATOMS
from fimprobe.model.copies.object_copies import ObjectCopier

_FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_OTHER_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TABLES = {*_FORWARD_HOOKS, *_OTHER_HOOKS, "_parameters", "_buffers", "_modules"}
"""Attributes of every module that are copied by rules of their own."""

_FOREIGN = ("fimprobe.", "torch.distributed.", "backpack.")
"""Packages whose hooks observe or move a training and are not part of the model's function."""


@dataclass(kw_only=True)
class DerivedTensor:
    """A tensor that a module holds and that was computed from parameters.

    Attributes:
        original: The user's tensor.
        constant: Its values in the copy, without a graph.
    """

    original: Tensor
    constant: Tensor


class ModelCopier(ObjectCopier):
    """Copies modules with their hooks, and tensors with the memory that they share among each other.

    Neither ``__deepcopy__`` of a module nor any of its methods is called but ``__getstate__`` and
    ``__setstate__``, where a class defines them.

    Args:
        model: The outermost module. Weak references to its modules are followed.
        memo: Copies that exist, by the identity of the original.

    Attributes:
        derived: Tensors that were computed from parameters, and are constants in the copy.
        modules: Every copied module; also those that the model reaches only through closures.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        super().__init__(memo)
        self.derived: list[DerivedTensor] = []
        self.modules: list[nn.Module] = []
        self._members = {*map(id, model.modules()), *map(id, model.parameters())}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def is_followed(self, referent: object) -> bool:
        """Return whether it is a module or a parameter of the model, or has a copy."""
        return id(referent) in self._members or super().is_followed(referent)

    def copy_module(self, module: nn.Module) -> nn.Module:
        """Return a new module of the same class with copies of all attributes."""
        compiled = module.__dict__.get("_modules", {}).get("_orig_mod")
        if compiled is not None:  # torch.compile's wrapper: its contents are the model
            return self.add(module, self.copy(compiled))  # type: ignore[no-any-return]
        if isinstance(module, torch.jit.ScriptModule):
            return self.add(module, copy.deepcopy(module, self.memo))  # type: ignore[no-any-return]
        copied = self.add(module, object.__new__(type(module)))
        self.fill(copied, module)
        return copied  # type: ignore[no-any-return]

    def fill(self, copied: nn.Module, module: nn.Module, left_out: str = "__none__") -> None:
        """Give an empty module copies of a module's attributes.

        Args:
            copied: The empty module.
            module: The module with the attributes.
            left_out: Attributes that begin with this are not copied.
        """
        self.modules.append(copied)
        kind: Any = type(module)
        tables = (module.__dict__.get(table, {}) for table in ("_parameters", "_buffers"))
        if any(
            isinstance(x, (UninitializedBuffer, UninitializedParameter))
            for x in chain(*(t.values() for t in tables))
        ):
            raise FimprobeError(
                f"the model has a lazy layer {kind.__name__} that has seen no input; run one forward "
                "pass first"
            )
        attributes, slots = module.__dict__, {}
        if _has_slots(kind):
            attributes, slots = object.__getstate__(module)  # type: ignore[attr-defined]
        elif kind.__getstate__ is not nn.Module.__getstate__ and not hasattr(kind, "__deepcopy__"):
            attributes = kind.__getstate__(module)
        values = {
            name: self._copy_attribute(name, value)
            for name, value in attributes.items()
            if not name.startswith(left_out)
        }
        if kind.__setstate__ is nn.Module.__setstate__:
            copied.__dict__.update(values)
        else:
            copied.__setstate__(values)
        for name, value in (slots or {}).items():
            object.__setattr__(copied, name, self.copy(value))

    def _copy_attribute(self, name: str, value: Any) -> Any:
        if type(value) in ATOMS:
            return value
        if name not in _TABLES:
            return None if name == "_compiled_call_impl" else self.copy(value)
        table = self.add(value, OrderedDict() if isinstance(value, OrderedDict) else {})
        if value and name not in _OTHER_HOOKS:  # most of a module's tables are empty
            parts = without_foreign_hooks(value) if name in _FORWARD_HOOKS else value
            table.update({key: self.copy(part) for key, part in parts.items()})
        return table

    def copy_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the same values, strides and sharing, in memory of its own."""
        if isinstance(tensor, nn.Parameter):
            return self._copy_parameter(tensor)
        if tensor.grad_fn is not None:
            return self._copy_derived(tensor)
        copied = self._copy_values(tensor)
        return copied.requires_grad_(tensor.requires_grad)

    def _copy_parameter(self, parameter: nn.Parameter) -> Tensor:
        kind: Any = type(parameter)
        if kind is nn.Parameter:
            copied: Tensor = nn.Parameter(self._copy_values(parameter), parameter.requires_grad)
        else:  # a class of its own, with attributes of its own: quantized, distributed, ...
            return copy.deepcopy(parameter, self.memo)
        if parameter.__dict__:
            copied.__dict__.update({k: self.copy(v) for k, v in parameter.__dict__.items()})
        return copied

    def _copy_derived(self, tensor: Tensor) -> Tensor:
        """A view of a parameter's copy; or a constant, for the result of a computation."""
        base = tensor._base
        if base is not None and base.is_leaf and base.requires_grad and _is_strided(base):
            whole = self.copy(base)
            view: Tensor = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            return view
        constant = tensor.detach().clone()
        self.derived.append(DerivedTensor(original=tensor, constant=constant))
        return constant

    def _copy_values(self, tensor: Tensor) -> Tensor:
        data = tensor.detach()
        if type(data) is not Tensor or not _is_strided(data):
            return data.clone()
        storage = data.untyped_storage()
        pointer = storage.data_ptr()
        known = self._storages.get(pointer) if pointer else None
        if known is None:
            if storage.nbytes() == data.numel() * data.element_size() and data.is_contiguous():
                cloned = data.clone()
                if pointer:
                    self._storages[pointer] = cloned.untyped_storage()
                return cloned
            known = storage.clone()
            if pointer:
                self._storages[pointer] = known
        copied = torch.empty(0, dtype=data.dtype, device=data.device)
        return copied.set_(known, data.storage_offset(), data.size(), data.stride())

    def share_storage(self, tensor: Tensor) -> None:
        """Let copies of this tensor, and of whatever shares its memory, share it with the user's."""
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage


def is_foreign(hook: Any) -> bool:
    """Return whether a hook was registered by fimprobe or by ``torch.distributed``."""
    while hasattr(hook, "func"):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    where = [getattr(hook, "__module__", None), type(owner).__module__, type(hook).__module__]
    return any(f"{module}.".startswith(_FOREIGN) for module in where)


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _has_slots(kind: type) -> bool:
    return any(base.__dict__.get("__slots__") for base in kind.__mro__ if base is not nn.Module)


def without_foreign_hooks(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """Return the hooks of a module that are part of its function."""
    if not hooks:  # as in most tables
        return OrderedDict()
    return OrderedDict((key, hook) for key, hook in hooks.items() if not is_foreign(hook))


FORWARD_HOOKS: Sequence[str] = _FORWARD_HOOKS
BACKWARD_HOOKS: Sequence[str] = ("_backward_pre_hooks", "_backward_hooks")
