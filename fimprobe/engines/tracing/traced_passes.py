"""Forward passes with two numbers of samples, and the shapes of all calls of modules in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.data_dependence import DataDependence, ValueReads
from fimprobe.engines.tracing.recording import expand_index
from fimprobe.model.batch import Batch
from fimprobe.model.twin import is_transformed


@dataclass(kw_only=True)
class CallShapes:
    """The shapes of one call.

    Attributes:
        tensors: Indices of the tensors among the leaves of the arguments.
        inputs: Their shapes.
        outputs: Shapes of the outputs that depend on parameters and are not inputs.
    """

    tensors: list[int]
    inputs: list[torch.Size]
    outputs: list[torch.Size]


@dataclass(kw_only=True)
class TracedPasses:
    """Two passes.

    Attributes:
        sizes: Their numbers of samples.
        calls: The calls of each module in both passes.
        outputs: Outputs of the pass with the samples as they are.
        depends_on_values: Whether a number was read from a tensor.
        has_ragged_shapes: Whether an operation ran whose output's shape depends on values.
    """

    sizes: tuple[int, int]
    calls: tuple[dict[str, list[CallShapes]], dict[str, list[CallShapes]]]
    outputs: Tensor
    depends_on_values: bool
    has_ragged_shapes: bool


def trace_passes(
    problem: Problem, expand: dict[str, str], *, guesses: bool = False
) -> TracedPasses | None:
    """Run two sizes; None if the model runs with one size only.

    Args:
        problem: A few samples.
        expand: How lookups are expanded.
        guesses: Whether the first pass adds lookups to ``expand``.

    Raises:
        Exception: What the model raises with the samples as they are.
    """
    batch, size = problem.batch, problem.batch.size
    operations = DataDependence()
    with operations, ValueReads(operations):
        calls, outputs = _run(problem, batch, expand, guesses=guesses)
    larger = batch[torch.arange(size + 1) % size]  # a sample that repeats needs no other input
    for other in (larger, batch[: size - 1]):
        if other.size == 0:
            continue
        try:
            other_calls, _ = _run(problem, other, expand)
        except Exception:  # a fixed number of samples, or an odd one
            continue
        return TracedPasses(
            sizes=(size, other.size),
            calls=(calls, other_calls),
            outputs=outputs,
            depends_on_values=operations.reads_values,
            has_ragged_shapes=operations.has_ragged_shapes,
        )
    return None


def _run(
    problem: Problem, batch: Batch, expand: dict[str, str], *, guesses: bool = False
) -> tuple[dict[str, list[CallShapes]], Tensor]:
    """One pass with autograd on, as when it is recorded: torch takes the same ways through layers."""
    with _record_shapes(problem.twin, batch.size, expand, guesses=guesses) as calls:
        outputs = problem.forward(batch).detach()
    return calls, outputs


@contextmanager
def _record_shapes(
    twin: nn.Module, size: int, expand: dict[str, str], *, guesses: bool
) -> Iterator[dict[str, list[CallShapes]]]:
    """Collect the shapes of all calls of modules inside the context.

    Args:
        twin: The copy of the model that is measured.
        size: Number of samples.
        expand: How lookups are expanded.
        guesses: Whether to add lookups to ``expand`` by the shapes of their indices.
    """
    calls: dict[str, list[CallShapes]] = {}
    handles = []

    def record(path: str, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if is_transformed():
            return
        # most modules have one tensor in and out, whose leaves need no search
        is_plain = not kwargs and all(type(x) is Tensor for x in args)
        leaves = list(args) if is_plain else tree_leaves((args, kwargs))
        # nested tensors have no shape; torch's frozen encoders use them between their layers
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not x.is_nested]
        inputs = {id(leaves[i]) for i in tensors}
        calls.setdefault(path, []).append(
            CallShapes(
                tensors=tensors,
                inputs=[leaves[i].shape for i in tensors],
                outputs=[
                    x.shape
                    for x in ([out] if isinstance(out, Tensor) else tree_leaves(out))
                    if isinstance(x, Tensor) and x.requires_grad and id(x) not in inputs
                ],
            )
        )

    def expand_index_of(path: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if guesses and path not in expand and (kind := _guess_expansion(args, size)):
            expand[path] = kind
        return expand_index(expand[path], size, module, args) if path in expand else None

    for path, module in twin.named_modules():
        if path in expand or (guesses and is_trained_lookup(module)):
            before = functools.partial(expand_index_of, path)
            handles.append(module.register_forward_pre_hook(before))
        after = functools.partial(record, path)
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def is_trained_lookup(module: nn.Module) -> bool:
    """Return whether a module is an embedding that is trained and measured by a rule."""
    trained = type(module) is nn.Embedding and module.weight.requires_grad
    return trained and bool(rules_for(module))


def _guess_expansion(args: tuple[Any, ...], size: int) -> str | None:
    """How an index of this shape is expanded if all samples share it; None if they do not.

    Args:
        args: The arguments of the lookup.
        size: Number of samples, more than one.
    """
    if not args or not isinstance(args[0], Tensor) or is_transformed():
        return None
    shape = args[0].shape
    if len(shape) > 1 and shape[0] == 1:
        return "leading"
    return "missing" if len(shape) == 1 and shape[0] != size else None
