"""Where each module holds the batch, from two forward passes with different numbers of samples.

A dimension that grows from B to B+1 with the batch holds the samples; one that keeps its length does
not, whatever the length. The shapes of one pass alone cannot show this: a table of T rows looks like
a batch of T samples.

Where shapes depend on data (the tokens that are no padding, say), two passes show the layout of their
own samples only. The order of the samples is then compared in every measurement; see
:mod:`fimprobe.engines.tracing.order_check`.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.data_dependence import DataDependence, ValueReads
from fimprobe.engines.tracing.recording import expand_index
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import Layout
from fimprobe.model.twin import is_transformed

_SHARED = "shared"
"""The layout of a tensor that has the same shape for every number of samples."""


def trace_layouts(problem: Problem, tolerance: float) -> BatchLayouts:
    """Return the layouts that two forward passes of different sizes show.

    Lookups whose index has no batch dimension are expanded to one, unless this changes the outputs.

    Args:
        problem: A few samples.
        tolerance: Relative difference of outputs that rounding explains.

    Returns:
        The layouts; those of a model that runs with one size only are not traced.
    """
    plain = _trace(problem, {})
    if plain is None:
        return BatchLayouts()
    expand = _lookups_without_batch(problem.twin, plain)
    if expand:
        try:
            expanded = _trace(problem, expand)
        except (RuntimeError, FimprobeError, ValueError, IndexError):
            expanded = None
        if expanded is not None and is_close(plain.outputs, expanded.outputs, tolerance):
            return _layouts(problem, expanded, expand)
    return _layouts(problem, plain, {})


def is_close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Return whether two tensors of one shape agree.

    Args:
        x: A tensor, whose largest entry the tolerance is relative to.
        y: The other one.
        tolerance: The largest relative difference; integers must be equal.
    """
    if not x.is_floating_point():
        return torch.equal(x, y)
    largest = float(x.abs().amax()) if x.numel() else 0.0
    return torch.allclose(x, y, rtol=0, atol=tolerance * largest)


@dataclass(kw_only=True)
class _CallShapes:
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
class _Trace:
    """Two passes.

    Attributes:
        sizes: Their numbers of samples.
        calls: The calls of each module in both passes.
        outputs: Outputs of the pass with the samples as they are.
        depends_on_values: Whether a number was read from a tensor.
        has_ragged_shapes: Whether an operation ran whose output's shape depends on values.
    """

    sizes: tuple[int, int]
    calls: tuple[dict[str, list[_CallShapes]], dict[str, list[_CallShapes]]]
    outputs: Tensor
    depends_on_values: bool
    has_ragged_shapes: bool


def _trace(problem: Problem, expand: dict[str, str]) -> _Trace | None:
    """Run two sizes; None if the model runs with one size only.

    Raises:
        Exception: What the model raises with the samples as they are.
    """
    batch, size = problem.batch, problem.batch.size
    calls, outputs, operations = _run(problem, batch, expand)
    larger = batch[torch.arange(size + 1) % size]  # a sample that repeats needs no other input
    for other in (larger, batch[: size - 1]):
        if other.size == 0:
            continue
        try:
            other_calls, _, _ = _run(problem, other, expand)
        except Exception:  # a fixed number of samples, or an odd one
            continue
        return _Trace(
            sizes=(size, other.size),
            calls=(calls, other_calls),
            outputs=outputs,
            depends_on_values=operations.reads_values,
            has_ragged_shapes=operations.has_ragged_shapes,
        )
    return None


def _run(
    problem: Problem, batch: Batch, expand: dict[str, str]
) -> tuple[dict[str, list[_CallShapes]], Tensor, DataDependence]:
    """One pass with autograd on, as when it is recorded: torch takes the same ways through layers."""
    operations = DataDependence()
    reads = ValueReads(operations)
    with _record_shapes(problem.twin, batch.size, expand) as calls, operations, reads:
        outputs = problem.forward(batch).detach()
    return calls, outputs, operations


@contextmanager
def _record_shapes(
    twin: nn.Module, size: int, expand: dict[str, str]
) -> Iterator[dict[str, list[_CallShapes]]]:
    """Collect the shapes of all calls of modules inside the context."""
    calls: dict[str, list[_CallShapes]] = {}
    handles = []

    def record(path: str, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if is_transformed():
            return
        leaves = tree_leaves((args, kwargs))
        # nested tensors have no shape; torch's frozen encoders use them between their layers
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not x.is_nested]
        inputs = {id(leaves[i]) for i in tensors}
        calls.setdefault(path, []).append(
            _CallShapes(
                tensors=tensors,
                inputs=[leaves[i].shape for i in tensors],
                outputs=[
                    x.shape
                    for x in tree_leaves(out)
                    if isinstance(x, Tensor) and x.requires_grad and id(x) not in inputs
                ],
            )
        )

    for path, module in twin.named_modules():
        if path in expand:
            before = functools.partial(expand_index, expand[path], size)
            handles.append(module.register_forward_pre_hook(before))
        after = functools.partial(record, path)
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _lookups_without_batch(twin: nn.Module, trace: _Trace) -> dict[str, str]:
    """How to expand the index of each trainable lookup whose index all samples share."""
    expand = {}
    for path, module in twin.named_modules():
        if type(module) is not nn.Embedding or not module.weight.requires_grad:
            continue
        if not rules_for(module):
            continue
        pairs = _paired_calls(trace, path)
        if not pairs or any(_input_layouts(trace, pair) != [_SHARED] for pair in pairs):
            continue
        shapes = {call.inputs[0] for call, _ in pairs}
        if all(len(shape) > 1 and shape[0] == 1 for shape in shapes):
            expand[path] = "leading"
        elif all(len(shape) == 1 for shape in shapes):
            expand[path] = "missing"
    return expand


def _layouts(problem: Problem, trace: _Trace, expand: dict[str, str]) -> BatchLayouts:
    """The layout of each module."""
    layouts = BatchLayouts(traced=True, expand=expand)
    for path, module in problem.twin.named_modules():
        pairs = _paired_calls(trace, path)
        if not pairs:
            continue
        of_tensors = {
            layout for pair in pairs for layout in (*_input_layouts(trace, pair), *_out(trace, pair))
        }
        layouts.of[path] = of_tensors.pop() if len(of_tensors) == 1 else None  # type: ignore[assignment]
        if layouts.of[path] not in (0, 1, "folded"):  # no rule reads another layout
            layouts.of[path] = None
        reads_values = trace.depends_on_values or _has_numbers(problem.batch)
        depends_on_data = trace.has_ragged_shapes or reads_values
        layouts.calls[path] = _batched_arguments(trace, pairs, depends_on_data=depends_on_data)
        if depends_on_data and rules_for(module) and layouts.of[path] is not None:
            layouts.unsure.add(path)
    return layouts


def _has_numbers(batch: Batch) -> bool:
    """Whether lengths may be among the inputs: numbers that are no tensor."""
    leaves = tree_leaves((batch.args, batch.kwargs))
    return any(isinstance(x, numbers.Number) and not isinstance(x, bool) for x in leaves)


_Pair = tuple[_CallShapes, _CallShapes]


def _paired_calls(trace: _Trace, path: str) -> list[_Pair]:
    """The calls of a module in both passes; none if the passes differ in more than their size."""
    first, second = (calls.get(path, []) for calls in trace.calls)
    alike = len(first) == len(second) and all(
        a.tensors == b.tensors and len(a.outputs) == len(b.outputs)
        for a, b in zip(first, second, strict=True)
    )
    return list(zip(first, second, strict=True)) if alike else []


def _batched_arguments(
    trace: _Trace, pairs: list[_Pair], *, depends_on_data: bool
) -> list[list[Any]]:
    """The distinct kinds of calls, with the arguments that hold the batch.

    A kind is left out if the batch cannot be located in an argument, or if two calls of the same kind
    differ. Where shapes depend on data, only a first dimension is trusted.
    """
    kinds: dict[tuple[int, ...], list[list[Any] | None]] = {}
    for pair in pairs:
        tensors = pair[0].tensors
        inputs = _input_layouts(trace, pair)
        outputs = set(_out(trace, pair)) or {0}
        known = {*inputs, *outputs} <= {0, _SHARED} or not depends_on_data
        known &= None not in inputs and len(outputs) == 1 and not outputs & {None, _SHARED}
        batched = [[i, x] for i, x in zip(tensors, inputs, strict=True) if x != _SHARED]
        kind = [batched, _broadcast(tuple(tensors), pairs), *outputs] if known else None
        kinds.setdefault(tuple(tensors), []).append(kind)
    return [
        [list(tensors), *first]
        for tensors, (first, *others) in kinds.items()
        if first is not None and all(other == first for other in others)
    ]


def _broadcast(tensors: tuple[int, ...], pairs: list[_Pair]) -> list[int]:
    """Arguments whose first dimension has length 1 for any number of samples."""
    calls = [call for call, _ in pairs if call.tensors == list(tensors)]
    return [i for place, i in enumerate(tensors) if calls[0].inputs[place][:1] == (1,)]


def _input_layouts(trace: _Trace, pair: _Pair) -> list[Layout | None]:
    return [_layout(a, b, trace.sizes) for a, b in zip(pair[0].inputs, pair[1].inputs, strict=True)]


def _out(trace: _Trace, pair: _Pair) -> list[Layout | None]:
    return [_layout(a, b, trace.sizes) for a, b in zip(pair[0].outputs, pair[1].outputs, strict=True)]


def _layout(shape: torch.Size, other: torch.Size, sizes: tuple[int, int]) -> Layout | None:
    """Where a tensor holds the batch, from its shapes with two numbers of samples.

    Args:
        shape: Its shape with the first number of samples.
        other: Its shape with the second.
        sizes: The numbers of samples.

    Returns:
        The dimension, "folded", "shared", or None where it is none of them.
    """
    if shape == other:
        return _SHARED
    if len(shape) != len(other):
        return None
    grown = [i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if len(grown) > 1:
        return None
    place = grown[0]
    lengths = shape[place], other[place]
    if lengths == sizes:
        return place
    is_multiple = lengths[0] * sizes[1] == lengths[1] * sizes[0] and lengths[0] % sizes[0] == 0
    return "folded" if place == 0 and is_multiple and len(shape) > 1 else None
