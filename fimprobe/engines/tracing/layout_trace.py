"""Where each module holds the batch, from two forward passes with different numbers of samples.

A dimension that grows from B to B+1 with the batch holds the samples; one that keeps its length does
not, whatever the length. The shapes of one pass alone cannot show this: a table of T rows looks like
a batch of T samples.

Where shapes depend on data (the tokens that are no padding, say), two passes show the layout of their
own samples only. The order of the samples is then compared in every measurement; see
:mod:`fimprobe.engines.tracing.order_check`.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.traced_passes import (
    CallShapes,
    TracedPasses,
    is_trained_lookup,
    trace_passes,
)
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import Layout

_SHARED = "shared"
"""The layout of a tensor that has the same shape for every number of samples."""


def trace_layouts(problem: Problem, outputs: Tensor, tolerance: float) -> BatchLayouts:
    """Return the layouts that two forward passes of different sizes show.

    Lookups whose index has no batch dimension are expanded to one, unless this changes the outputs.
    Most of them are recognised in the first pass, which saves two more.

    Args:
        problem: A few samples.
        outputs: Their outputs [B, ...].
        tolerance: Relative difference of outputs that rounding explains.

    Returns:
        The layouts; those of a model that runs with one size only are not traced.
    """
    expand: dict[str, str] = {}
    plain = _trace_expanded(problem, expand, guesses=problem.batch.size > 1)
    if expand:
        if plain is not None and _is_right(plain, expand, outputs, tolerance):
            return _layouts(problem, plain, expand)
        plain = trace_passes(problem, {})
    if plain is None:
        return BatchLayouts()
    expand = _lookups_without_batch(problem.twin, plain)
    expanded = _trace_expanded(problem, expand) if expand else None
    if expanded is not None and _is_right(expanded, expand, outputs, tolerance):
        return _layouts(problem, expanded, expand)
    return _layouts(problem, plain, {})


def _trace_expanded(
    problem: Problem, expand: dict[str, str], *, guesses: bool = False
) -> TracedPasses | None:
    """Run two sizes; None if the model fails with expanded lookups, or runs with one size only.

    Args:
        problem: A few samples.
        expand: How lookups are expanded.
        guesses: Whether to add lookups to ``expand`` by the shapes of their indices.

    Raises:
        Exception: What the model raises without any expansion.
    """
    try:
        return trace_passes(problem, expand, guesses=guesses)
    except (RuntimeError, FimprobeError, ValueError, IndexError):
        if not expand:
            raise
        return None


def _is_right(trace: TracedPasses, expand: dict[str, str], outputs: Tensor, tolerance: float) -> bool:
    """Return whether expanded lookups hold the batch first, and change no output.

    Args:
        trace: Two passes with the expansion.
        expand: How lookups are expanded.
        outputs: Outputs without it.
        tolerance: Relative difference of outputs that rounding explains.
    """
    for path in expand:
        pairs = _paired_calls(trace, path)
        if not pairs or any(_input_layouts(trace, pair) != [0] for pair in pairs):
            return False
    return outputs.shape == trace.outputs.shape and is_close(outputs, trace.outputs, tolerance)


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


def _lookups_without_batch(twin: nn.Module, trace: TracedPasses) -> dict[str, str]:
    """How to expand the index of each trainable lookup whose index all samples share."""
    expand = {}
    for path, module in twin.named_modules():
        if not is_trained_lookup(module):
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


def _layouts(problem: Problem, trace: TracedPasses, expand: dict[str, str]) -> BatchLayouts:
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


_Pair = tuple[CallShapes, CallShapes]


def _paired_calls(trace: TracedPasses, path: str) -> list[_Pair]:
    """The calls of a module in both passes; none if the passes differ in more than their size."""
    first, second = (calls.get(path, []) for calls in trace.calls)
    alike = len(first) == len(second) and all(
        a.tensors == b.tensors and len(a.outputs) == len(b.outputs)
        for a, b in zip(first, second, strict=True)
    )
    return list(zip(first, second, strict=True)) if alike else []


def _batched_arguments(
    trace: TracedPasses, pairs: list[_Pair], *, depends_on_data: bool
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


def _input_layouts(trace: TracedPasses, pair: _Pair) -> list[Layout | None]:
    return [_layout(a, b, trace.sizes) for a, b in zip(pair[0].inputs, pair[1].inputs, strict=True)]


def _out(trace: TracedPasses, pair: _Pair) -> list[Layout | None]:
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
