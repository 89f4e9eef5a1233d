"""The twin of a model that FSDP2 shards: each unit's weights are gathered for its forward only.

``fully_shard`` leaves every process a part of the rows of each parameter. The twin never touches the
model or FSDP's state: it gathers the weights of a unit over a process group of its own when the
unit's forward begins, drops them when it ends, and gathers a weight again where the backward asks for
it. Per-sample gradients need a parameter's shape only; their sums go to the process that holds the
rows. No process ever holds all weights, nor all sums.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.model.fsdp.placement import is_part, units
from fimprobe.model.fsdp.shards import Shards
from fimprobe.model.twin import TwinSettings, copy_twin, unwrap


def make_sharded_twin(model: nn.Module, shards: Shards) -> nn.Module:
    """Return a twin without weights, which gathers them from the model's shards while it runs.

    Args:
        model: The model, sharded by ``fully_shard``.
        shards: Receives the sharded parameters of the model, by name.

    Returns:
        The twin; its sharded parameters have the whole shape, and values during a forward only.
    """
    model = unwrap(model)
    memo: dict[int, Any] = {}
    parameter: Any
    for parameter in model.parameters():
        if is_part(parameter):
            memo[id(parameter)] = nn.Parameter(
                _nothing(parameter.detach().to_local(), parameter.shape), parameter.requires_grad
            )
    sharded_units = list(units(model))
    for unit in sharded_units:  # FSDP's classes refuse to be copied: the class they were made from is
        plain: Any = type(unit).__mro__[2]
        memo[id(unit)] = plain.__new__(plain)
    twin, _ = copy_twin(model, TwinSettings(), memo, sharded_units)
    owner: dict[int, nn.Module] = {}
    for unit in sharded_units:  # outermost first: the innermost unit is the one that gathers
        for parameter in unit.parameters():
            owner[id(parameter)] = unit
    held: dict[int, dict[str, nn.Parameter]] = {id(unit): {} for unit in sharded_units}
    for name, parameter in model.named_parameters():
        if is_part(parameter):
            shards.parts[name] = parameter
            held[id(owner[id(parameter)])][name] = memo[id(parameter)]
    for unit in sharded_units:
        copied, parameters = memo[id(unit)], held[id(unit)]
        if parameters:
            copied.register_forward_pre_hook(functools.partial(_fill, shards, parameters))
            copied.register_forward_hook(
                functools.partial(_empty, shards, parameters), always_call=True
            )
    return twin


def _fill(shards: Shards, parameters: dict[str, nn.Parameter], *call: Any) -> None:
    for name, parameter in parameters.items():
        parameter.data = shards.gather(name)
        shards.live[parameter.untyped_storage().data_ptr()] = name


def _empty(shards: Shards, parameters: dict[str, nn.Parameter], *call: Any) -> None:
    for parameter in parameters.values():
        shards.live.pop(parameter.untyped_storage().data_ptr(), None)
        parameter.data = _nothing(parameter, parameter.shape)


def _nothing(like: Tensor, shape: torch.Size) -> Tensor:
    """Return NaN of a shape, without memory for each entry; integers are 0.

    NaN shows where a weight is used that was not gathered.
    """
    value = float("nan") if like.is_floating_point() else 0
    return torch.full((), value, dtype=like.dtype, device=like.device).expand(shape)
