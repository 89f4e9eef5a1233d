"""How a model's parameters are placed on processes, and whether they can be measured so."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from fimprobe.errors import FimprobeError


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP, of either version, or tensor parallelism splits the parameters.

    FSDP2's outermost unit holds its parameters whole after a forward without backward.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for module in model.modules() if tensors is not None or fsdp is not None else ():
        if isinstance(module, kinds):
            return True
        parameters = module._parameters.values()
        if tensors is not None and any(isinstance(p, tensors.DTensor) for p in parameters):
            return True
    return False


def is_part(x: Any) -> bool:
    """Return whether a tensor is a DTensor: this process holds a part of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_sharded(
    model: nn.Module,
    *,
    estimators: Sequence[str],
    bounds: bool,
    draws: int | str,
    engine: str,
    diagonals: bool = False,
    processes: int | None = None,
) -> None:
    """Check that a sharded model can be measured with these options.

    Args:
        model: The model, sharded by ``fully_shard``.
        estimators: The option, one name or several; only "i1" is possible.
        bounds: The option; only False is possible.
        draws: The option; "exact" is not possible.
        engine: The option; "backpack" is not possible.
        diagonals: Whether the diagonals of F are asked for; only False is possible.
        processes: Number of processes that measure together; None for all.

    Raises:
        FimprobeError: If an option is not possible. Also for FSDP1, for a parameter that is
            offloaded or not sharded by rows over all these processes, and for an embedding with
            ``max_norm``.
    """
    if _whole_fsdp(model):
        raise FimprobeError(
            "`model` is wrapped by FullyShardedDataParallel (FSDP1), whose flat parameters cannot be "
            "measured. Use FSDP2: torch.distributed.fsdp.fully_shard (Accelerate: fsdp_version: 2)."
        )
    estimators = [estimators] if isinstance(estimators, str) else estimators
    asked = {"estimators": list(estimators), "bounds": bounds, "draws": draws, "engine": engine}
    wrong = {
        "estimators": set(estimators) != {"i1"},
        "bounds": bounds,
        "draws": draws == "exact",
        "engine": engine == "backpack",
    }
    if any(wrong.values()) or diagonals:
        given = ", ".join(f"{key}={asked[key]!r}" for key, bad in wrong.items() if bad)
        raise FimprobeError(
            f"{given or 'diagonals=True'} is not supported for a model sharded by FSDP. Only Î₁ with "
            'sampled labels is: pass estimators=("i1",), bounds=False'
            + (", draws=2" if wrong["draws"] else "")
            + "."
        )
    processes = dist.get_world_size() if processes is None else processes
    held = {id(p) for unit in units(model) for p in unit.parameters()}
    parameter: Any
    for name, parameter in model.named_parameters():
        if not is_part(parameter):
            continue
        problem = _describe_placement(parameter, held, processes)
        if problem:
            raise FimprobeError(
                f"parameter {name!r} {problem}. A sharded model can be measured if fully_shard "
                "shards it by rows over all processes and all of them measure; attach on every one."
            )
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise FimprobeError(
                f"{path!r} has max_norm, which is not supported for a sharded model. Remove max_norm."
            )


def _describe_placement(parameter: Any, held: Collection[int], processes: int) -> str:
    """Return why a sharded parameter cannot be measured, in words; empty if it can."""
    mesh: Any = parameter.device_mesh
    if id(parameter) not in held:
        return "is a DTensor that fully_shard did not make"
    if mesh.ndim != 1:
        return f"is spread over a mesh of {mesh.ndim} dimensions (HSDP, tensor parallelism)"
    if mesh.mesh.tolist() != list(range(processes)):
        return f"lies on processes {mesh.mesh.tolist()}, but {processes} measure together"
    if not parameter.placements[0].is_shard(0):
        return f"is placed {parameter.placements[0]}, not sharded by rows"
    if parameter.device.type != mesh.device_type:
        return f"is offloaded to the {parameter.device.type}"
    return ""


def _whole_fsdp(model: nn.Module) -> bool:
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(
        isinstance(m, module.FullyShardedDataParallel) for m in model.modules()
    )


def units(model: nn.Module) -> Iterator[nn.Module]:
    """Return the modules that ``fully_shard`` was called on, outermost first."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        yield from (m for m in model.modules() if isinstance(m, module.FSDPModule))
