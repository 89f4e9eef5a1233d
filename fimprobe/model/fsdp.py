"""The twin of a model that FSDP2 shards: each unit's weights are gathered for its forward only.

``fully_shard`` leaves every process a part of the rows of each parameter. The twin never touches the
model or FSDP's state: it gathers the weights of a unit over a process group of its own when the
unit's forward begins, drops them when it ends, and gathers a weight again where the backward asks for
it. Per-sample gradients need a parameter's shape only; their sums go to the process that holds the
rows. No process ever holds all weights, nor all sums.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.model.twin import TwinSettings, copy_twin, unwrap


class Saved(NamedTuple):
    """A weight that autograd wants back: which one, and the view of it."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Shards:
    """The sharded parameters of a twin, by name: their weights gathered, their sums scattered.

    All methods that communicate are called by all processes, in the same order.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.parts: dict[str, Any] = {}
        self.bytes = 0
        """Saved for the backward since the last forward began."""
        self.live: dict[int, str] = {}
        """Addresses of the weights that are gathered now."""
        self.adds = True
        """Whether sums are those of all processes."""

    def __contains__(self, name: str) -> bool:
        """Return whether the parameter is sharded."""
        return name in self.parts

    def alone(self) -> Shards:
        """Return a copy whose sums are those of this process only."""
        shards = copy.copy(self)
        shards.adds = False
        return shards

    def gather(self, name: str) -> Tensor:
        """The whole parameter."""
        part = self.parts[name].detach()
        own = part.to_local().contiguous().reshape(-1)
        if self.size == 1:
            return own.clone().view(part.shape)
        each = self._rows(part.shape) * part.shape[1:].numel()
        sent = torch.zeros(each, dtype=own.dtype)
        sent[: own.numel()] = own
        received = torch.empty(self.size, each, dtype=own.dtype)
        # as bytes: not every type can be sent
        chunks = [row.view(torch.uint8) for row in received]
        self._bounded(lambda: dist.all_gather(chunks, sent.view(torch.uint8), group=self.group))
        whole = received.view(-1)[: part.numel()].view(part.shape)
        return whole.to(own.device)

    def scatter(self, name: str, x: Tensor) -> Any:
        """Return this process's rows of a tensor, added over the processes if ``adds`` is True.

        Args:
            name: A sharded parameter.
            x: This process's tensor, of the whole parameter's shape.

        Returns:
            A DTensor of that shape, placed like the parameter.

        Raises:
            FimprobeError: If the other processes do not answer.
        """
        part = self.parts[name]
        rows, width = self._rows(part.shape), part.shape[1:].numel()
        first = min(self.rank * rows, part.shape[0])
        count = min(rows, part.shape[0] - first)
        if self.adds and self.size > 1:
            sent = torch.zeros(self.size * rows * width, dtype=x.dtype)
            sent[: x.numel()] = x.reshape(-1)
            received = torch.empty_like(sent)
            self._bounded(lambda: dist.all_to_all_single(received, sent, group=self.group))
            own = received.view(self.size, rows * width).sum(0)[: count * width]
        else:
            own = x.reshape(part.shape[0], -1)[first : first + count].clone()
        own = own.view(count, *part.shape[1:]).to(x.device)
        shape, stride = part.shape, torch.empty(part.shape, device="meta").stride()
        return type(part.detach()).from_local(
            own, part.device_mesh, part.placements, run_check=False, shape=shape, stride=stride
        )

    def smallest(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.size == 1:
            return number
        smallest = torch.tensor([number])
        self._bounded(lambda: dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group))
        return int(smallest)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Run a forward whose weights are not kept: the backward gathers them again."""
        self.bytes = 0
        seen: set[int] = set()

        def pack(x: Tensor) -> Any:
            try:
                storage = x.untyped_storage()
            except (RuntimeError, NotImplementedError):  # tensors without storage
                return x.detach()
            name = self.live.get(storage.data_ptr())
            if name is not None:
                return Saved(name, x.size(), x.stride(), int(x.storage_offset()))
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return x.detach()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Saved):
                whole = self.gather(kept.name)
                return whole.as_strided(kept.size, kept.stride, kept.offset)
            return kept  # type: ignore[no-any-return]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def gradients(
        self, h: Tensor, parameters: dict[str, nn.Parameter], cotangent: Tensor
    ) -> dict[str, tuple[Tensor, float]]:
        """Return Jᵀ times a cotangent, as one plain backward computes it.

        Args:
            h: Outputs [B, ...] with their graph.
            parameters: The parameters of the twin, by name.
            cotangent: A vector at the outputs, of their shape.

        Returns:
            By name, the gradient and the squared norm of this process's whole gradient. A sharded
            parameter's gradient has the rows of this process only, from :meth:`scatter`.
        """
        gradients: dict[str, tuple[Tensor, float]] = {}

        def take(name: str, parameter: nn.Parameter) -> None:
            """Move the gradient of a parameter, as soon as it is complete, to the results.

            Args:
                name: Name of the parameter.
                parameter: The parameter; its ``grad`` becomes None.
            """
            g, parameter.grad = parameter.grad, None  # one at a time: never all of them
            assert g is not None
            kept = self.scatter(name, g).to_local() if name in self else g
            gradients[name] = kept, float(g.double().square().sum())

        handles = [
            p.register_post_accumulate_grad_hook(functools.partial(take, name))
            for name, p in parameters.items()
        ]
        try:
            h.backward(cotangent, inputs=list(parameters.values()))
        finally:
            for handle in handles:
                handle.remove()
        return gradients

    def _rows(self, shape: Sequence[int]) -> int:
        return -(-shape[0] // self.size)

    def _bounded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise FimprobeError(
                f"the other processes did not answer: {str(error).splitlines()[0]}"
            ) from error


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
    held = {id(p) for unit in _units(model) for p in unit.parameters()}
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
    units = list(_units(model))
    for unit in units:  # FSDP's classes refuse to be copied: the class they were made from is
        plain: Any = type(unit).__mro__[2]
        memo[id(unit)] = plain.__new__(plain)
    twin, _ = copy_twin(model, TwinSettings(), memo, units)
    owner: dict[int, nn.Module] = {}
    for unit in units:  # outermost first: the innermost unit is the one that gathers
        for parameter in unit.parameters():
            owner[id(parameter)] = unit
    held: dict[int, dict[str, nn.Parameter]] = {id(unit): {} for unit in units}
    for name, parameter in model.named_parameters():
        if is_part(parameter):
            shards.parts[name] = parameter
            held[id(owner[id(parameter)])][name] = memo[id(parameter)]
    for unit in units:
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


def _whole_fsdp(model: nn.Module) -> bool:
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(
        isinstance(m, module.FullyShardedDataParallel) for m in model.modules()
    )


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that ``fully_shard`` was called on, outermost first."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        yield from (m for m in model.modules() if isinstance(m, module.FSDPModule))
