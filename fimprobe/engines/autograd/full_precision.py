"""Evaluation in float32 of what a model stores or computes in half precision, for verification.

In half precision, rounding hides a wrong gradient of a quarter of its size. The plan does not depend
on the type of numbers: what is verified in float32 holds in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import FimprobeError

HALF_TYPES = frozenset({torch.float16, torch.bfloat16})

SAME_MODEL_TOLERANCE = 0.1
"""Relative difference of outputs between half precision and float32, 13 roundings in bfloat16.

Above it float32 computes something else, such as another expert of a mixture.
"""


@contextmanager
def full_precision(problem: Problem) -> Iterator[Problem | None]:
    """Let the twin compute in float32 inside the context.

    The twin's tensors are replaced, not written, and put in place again afterwards.

    Args:
        problem: The measurement; its twin belongs to it alone.

    Yields:
        The problem in float32; None if it cannot be evaluated so, or computes something else there.
    """
    if problem.shards is not None:
        yield None
        return
    replaced: list[tuple[Tensor, Tensor]] = []
    attributes: list[tuple[nn.Module, str, Tensor]] = []
    try:
        full = _replace_tensors(problem, replaced, attributes)
        with _FloatForHalf():
            yield full
    finally:
        for tensor, data in replaced:
            tensor.data = data
        for module, name, tensor in attributes:
            module.__dict__[name] = tensor


def _replace_tensors(
    problem: Problem,
    replaced: list[tuple[Tensor, Tensor]],
    attributes: list[tuple[nn.Module, str, Tensor]],
) -> Problem | None:
    """The problem in float32; None if it does not agree with that in half precision.

    Args:
        problem: The measurement.
        replaced: Receives parameters and buffers, with their data in half precision.
        attributes: Receives other tensors, with the module and the attribute that hold them.
    """
    twin, first = problem.twin, problem.batch[:1]
    batch = replace(
        problem.batch,
        args=tree_map(_to_float32, problem.batch.args),
        kwargs=tree_map(_to_float32, problem.batch.kwargs),
    )
    full = replace(problem, batch=batch)
    try:
        expected = problem.evaluate(first).float()
        for tensor in [*twin.parameters(), *twin.buffers()]:
            if tensor.dtype in HALF_TYPES:
                replaced.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        for module in twin.modules():
            for name, value in list(module.__dict__.items()):
                if isinstance(value, Tensor) and value.dtype in HALF_TYPES:
                    attributes.append((module, name, value))
                    module.__dict__[name] = value.detach().float()
        with _FloatForHalf():
            outputs = full.evaluate(batch[:1]).float()
    except (RuntimeError, TypeError, ValueError, FimprobeError):  # kernels for half precision only
        return None
    bound = SAME_MODEL_TOLERANCE * float(expected.abs().amax())
    same = outputs.shape == expected.shape and bool(((outputs - expected).abs() <= bound).all())
    return full if same else None


class _FloatForHalf(TorchFunctionMode):
    """Casts to half precision, and new tensors of it, become float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with float32 in place of half-precision types."""
        if func in (Tensor.half, Tensor.bfloat16):
            func = Tensor.float
        args = tuple(_to_float32_type(x) for x in args)
        return func(*args, **{k: _to_float32_type(x) for k, x in (kwargs or {}).items()})


def _to_float32_type(x: Any) -> Any:
    return torch.float32 if isinstance(x, torch.dtype) and x in HALF_TYPES else x


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF_TYPES else x
