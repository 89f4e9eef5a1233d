"""One forward and backward of a model on a few samples, and the comparison of two of them."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.leftovers import dropping_leftovers
from fimprobe.model.randomness import HostStreams, PrivateRandomness
from fimprobe.model.storage_guard import StorageGuard, addresses

Selector = Callable[[Any], Tensor]
"""From what a model returns to the outputs [B, ...]."""

_SEED = 20240525

_COMPARED = 2**18
"""Entries that are compared at once, so that the comparison of large outputs takes little memory."""


@dataclass(kw_only=True)
class Run:
    """The results of one forward and backward.

    Attributes:
        outputs: The selected outputs [B, ...], detached.
        gradients: Of a random projection of the outputs, by name; None where none arrives.
        reached: Names of the tensors that the outputs depend on.
        drew_from_torch: Whether random numbers were drawn by torch.
        moved_streams: The streams of Python and numpy before the run, if they moved meanwhile.
    """

    outputs: Tensor
    gradients: dict[str, Tensor | None]
    reached: set[str]
    drew_from_torch: bool
    moved_streams: HostStreams | None

    @property
    def drew_random(self) -> bool:
        """Whether random numbers were drawn."""
        return self.drew_from_torch or self.moved_streams is not None


@dataclass
class Randomness:
    """Which random numbers were drawn inside of :func:`same_randomness`, once it has ended.

    Attributes:
        by_torch: Whether they were drawn by torch.
        moved_streams: The streams of Python and numpy before, if they moved.
    """

    by_torch: bool = field(default=False)
    moved_streams: HostStreams | None = field(default=None)

    @property
    def moved(self) -> bool:
        """Whether random numbers were drawn."""
        return self.by_torch or self.moved_streams is not None


def run_model(
    model: nn.Module,
    batch: Batch,
    select_outputs: Selector,
    tensors: Mapping[str, Tensor],
    guard: StorageGuard,
    *,
    backward: bool = True,
    host: bool = False,
) -> Run:
    """Run a model forward and backward on copies of the inputs.

    Args:
        model: A twin, or the user's modules.
        batch: The samples.
        select_outputs: From what the model returns to the outputs.
        tensors: What the gradients belong to, by name.
        guard: Watches all operations.
        backward: Whether to compute gradients.
        host: As in :func:`same_randomness`.

    Raises:
        FimprobeError: If ``select_outputs`` returns no tensor.
    """
    args, kwargs = clone_inputs(batch)
    guard.watch_inputs(addresses({"inputs": [args, kwargs]}))
    gradients: Sequence[Tensor | None] = [None] * len(tensors)
    with same_randomness(host=host, guard=guard) as randomness, dropping_leftovers(model):
        with guard:
            outputs = select_outputs(model(*args, **kwargs))
        if not isinstance(outputs, Tensor):
            raise FimprobeError(
                f"`output` must return the tensor of outputs [B, ...], got {type(outputs).__name__}"
            )
        if outputs.is_complex():
            raise FimprobeError(
                f"the outputs must be real, got {describe_tensor(outputs)}. Pass `output`, a "
                "function from what the model returns to real outputs, such as absolute values."
            )
        leaves = find_leaves(outputs.grad_fn)
        if outputs.requires_grad and tensors and backward:
            projection = (outputs * _random_like(outputs)).sum()  # a scalar: less to import for torch
            with guard:
                unset = {n: x for n, x in tensors.items() if x.is_leaf and x.grad is None}
                gradients = torch.autograd.grad(projection, list(tensors.values()), allow_unused=True)
            _check_grad_unset(unset)
    return Run(
        outputs=outputs.detach(),
        gradients=dict(zip(tensors, gradients, strict=True)),
        reached={name for name, tensor in tensors.items() if id(tensor) in leaves},
        drew_from_torch=randomness.by_torch,
        moved_streams=randomness.moved_streams,
    )


def _check_grad_unset(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a backward filled ``grad``, which ``torch.autograd.grad`` does not.

    The graph does not show that the outputs depend on these parameters.
    """
    filled = [name for name, x in tensors.items() if x.grad is not None]
    if filled:
        raise FimprobeError(
            f"the model must leave gradients to autograd, but its backward adds those of "
            f"{list_names(filled)} to `grad` itself, as reentrant checkpoints of other packages do. "
            "Use torch.utils.checkpoint in its place."
        )


def find_leaves(node: Any) -> set[int]:
    """The identities of the leaves of a graph, from one of its nodes."""
    leaves, seen, pending = set(), set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        pending += [parent for parent, _ in node.next_functions]
    return leaves


def run_forward(
    model: nn.Module, batch: Batch, select_outputs: Selector, *, host: bool = False
) -> Tensor:
    """Return the outputs of a forward with the random numbers of :func:`run_model`.

    Args:
        model: A twin, or the user's modules.
        batch: The samples.
        select_outputs: From what the model returns to the outputs.
        host: As in :func:`same_randomness`.

    Returns:
        The outputs [B, ...], detached.
    """
    args, kwargs = clone_inputs(batch)
    with same_randomness(host=host):
        return select_outputs(model(*args, **kwargs)).detach()


def clone_inputs(batch: Batch) -> tuple[Any, Any]:
    """Positional and keyword inputs that a forward may overwrite."""
    return batch.map_tensors(lambda x: x.detach().clone())


def describe_difference(run: Run, reference: Run) -> str:
    """Return the first difference between the twin's run and the model's, in words.

    Args:
        run: The run of the twin.
        reference: The run of the model.

    Returns:
        The end of a sentence about the twin; empty if the runs agree within rounding.
    """
    a, b = run.outputs, reference.outputs
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"its outputs are {describe_tensor(a)}, the model's are {describe_tensor(b)}"
    if not almost_equal(a, b):
        return f"its outputs differ by up to {float((a - b).abs().max()):.2g} from the model's"
    unequal = {
        name: gradient
        for name, gradient in reference.gradients.items()
        if not _are_equal(run.gradients.get(name), gradient)
    }
    if not unequal:  # the same operations on the same numbers, as a rule
        return ""
    norms = [float(g.norm()) for g in reference.gradients.values() if g is not None]
    largest = max(filter(math.isfinite, norms), default=0.0)
    wrong = [
        name
        for name, gradient in unequal.items()
        if not _same_gradient(run.gradients.get(name), gradient, largest)
    ]
    return f"its gradients of {list_names(wrong)} differ from the model's" if wrong else ""


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two dense tensors have the same entries, or both are None."""
    if a is None or b is None:
        return a is b
    is_dense = a.layout == b.layout == torch.strided
    return is_dense and a.dtype == b.dtype and torch.equal(a, b)


def almost_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors agree within rounding, relative to the largest entry.

    Args:
        a: A tensor.
        b: The reference, whose largest finite entry and type set the tolerance.

    Returns:
        False also for different shapes or types. NaN equals NaN.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    pieces = list(zip(a.reshape(-1).split(_COMPARED), b.reshape(-1).split(_COMPARED), strict=True))
    largest = max((_largest_finite(piece) for _, piece in pieces), default=0.0)
    tolerance = rounding_tolerance(b.dtype)
    return all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
        for x, y in pieces
    )


def _largest_finite(x: Tensor) -> float:
    """The largest magnitude among finite entries; 0 if there are none."""
    finite = x[torch.isfinite(x)]
    return float(finite.abs().amax()) if finite.numel() else 0.0


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Relative difference of one computation in two orders: the square root of the rounding."""
    inexact = dtype.is_floating_point or dtype.is_complex
    return float(torch.finfo(dtype).eps ** 0.5) if inexact else 0.0


def describe_tensor(outputs: Tensor) -> str:
    """Type and shape, in words, and whether the values are probabilities."""
    kind = " of probabilities" if are_probabilities(outputs) else ""
    return f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}{kind}"


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether all values are in [0, 1], as those of a softmax or a sigmoid."""
    return outputs.is_floating_point() and bool(((outputs >= 0) & (outputs <= 1)).all())


def list_names(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in quotes, and how many more there are.

    Args:
        names: All names.
        most: Maximum number of names in quotes.
    """
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@contextmanager
def same_randomness(*, host: bool = False, guard: StorageGuard | None = None) -> Iterator[Randomness]:
    """Give each run the same random numbers without moving a global stream, and see whether it drew.

    Args:
        host: Whether the runs draw from the streams of Python or numpy, which are seeded and
            restored then.
        guard: Watches all operations that draw, if given: one mode costs less time than two.
    """
    randomness, private, before = Randomness(), PrivateRandomness(_SEED), HostStreams.read()
    start = before
    if host:
        random.seed(_SEED)
        if before.numpy is not None:
            sys.modules["numpy"].random.seed(_SEED)
        start = HostStreams.read()
    try:
        with private if guard is None else guard.drawing_from(private):
            yield randomness
    finally:
        randomness.by_torch = private.drew
        if HostStreams.read().key != start.key:
            randomness.moved_streams = before
        if host:
            before.restore()


def _random_like(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    direction = torch.rand(outputs.shape, generator=generator).sub_(0.5)
    return direction.to(outputs.device, outputs.dtype)


def _same_gradient(a: Tensor | None, b: Tensor | None, largest: float) -> bool:
    """Return whether two gradients agree within rounding, relative to the norm ``largest``."""
    if a is None or b is None:
        rest = a if b is None else b
        return rest is None or float(rest.norm()) <= rounding_tolerance(rest.dtype) ** 2 * largest
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    norm = float(b.norm())
    if not math.isfinite(norm) and not bool(torch.isfinite(b).all()):  # as of an infinite slope
        return torch.equal(torch.isfinite(a), torch.isfinite(b))
    tolerance = rounding_tolerance(b.dtype)
    return float((a - b).norm()) <= tolerance * (norm + tolerance * largest)
