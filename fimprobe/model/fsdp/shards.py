"""The sharded parameters of a twin: their weights are gathered, their sums scattered."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fimprobe.errors import FimprobeError


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
