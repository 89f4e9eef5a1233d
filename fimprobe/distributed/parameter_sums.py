"""The statistics of parameters' shapes, which processes add by all-reduce instead of sending them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.model.fsdp.placement import is_part
from fimprobe.statistics import Measured, Moments, MomentsBatch

Key = tuple[str, str, str]
"""A tensor of a parameter's shape: kind of cotangents, parameter, field."""

Shapes = dict[Key, tuple[torch.Size, torch.dtype]]
"""Shape and type of each such tensor."""

ACTIVATIONS = "activations"
"""The kind under which the moments of activations are merged."""

MOMENT_SUMS = ("a2", "a4", "q", "r")
CURVATURE_SUMS = ("diagonal", "diagonal_square")
"""The fields of these shapes, of :class:`Moments` and :class:`Curvature`."""


def sum_shapes(measured: Measured) -> Shapes:
    """Return shapes and types of the tensors that are added over processes."""
    return {key: (x.shape, x.dtype) for key, x in _sums(measured).items()}


def common_shapes(shapes: Sequence[Shapes]) -> Shapes:
    """Return the shapes of the tensors that all processes add.

    Activations are included only if they have the same shape in all processes.

    Args:
        shapes: :func:`sum_shapes` of each process.

    Raises:
        FimprobeError: If a parameter has different shapes or types.
    """
    common: Shapes = {}
    for key in sorted({key for local in shapes for key in local}):
        known = [local[key] for local in shapes if key in local]
        if key[0] == ACTIVATIONS and known != [known[0]] * len(shapes):
            continue  # the length of sequences differs: there is no common sum
        if len(set(known)) > 1:
            raise FimprobeError(
                f"parameter {key[1]!r} must have one shape and type in all processes, got {known}. "
                "Load the same model on every process."
            )
        common[key] = known[0]
    return common


def local_sums(measured: Measured, shapes: Shapes) -> dict[Key, Tensor]:
    """Return this process's tensors of the given shapes, zeros for those that it did not measure.

    Args:
        measured: The statistics of this process.
        shapes: :func:`common_shapes` of all processes.

    Returns:
        One tensor on the CPU for each key of ``shapes``.
    """
    sums = _sums(measured)
    return {
        key: sums[key] if key in sums else torch.zeros(shape, dtype=dtype)
        for key, (shape, dtype) in shapes.items()
    }


def sharded_sums(measured: Measured) -> dict[Key, Any]:
    """Return this process's rows of the sums of sharded parameters, which are already added."""
    return {
        (kind, name, "a2"): moments.a2
        for kind, batch in measured.moments.items()
        for name, moments in batch.parameters.items()
        if is_part(moments.a2)
    }


def drop_sums(measured: Measured) -> Measured:
    """Return the statistics without tensors of parameters' shapes, on the CPU.

    They are small enough to be sent to every process.
    """
    no_sums: dict[str, Any] = dict.fromkeys(MOMENT_SUMS) | {"a2": torch.empty(0)}
    no_diagonals: dict[str, Any] = dict.fromkeys(CURVATURE_SUMS)

    def without_sums(m: Moments) -> Moments:
        return replace(
            m,
            gram=None if m.gram is None else m.gram.cpu(),
            squared_norms=m.squared_norms.cpu(),
            powers=m.powers.cpu(),
            entries=None if m.entries is None else m.entries.cpu(),
            **no_sums,
        )

    moments = {
        kind: replace(
            batch, parameters={name: without_sums(m) for name, m in batch.parameters.items()}
        )
        for kind, batch in moments_by_kind(measured).items()
    }
    curvature = measured.curvature
    if curvature is not None:
        curvature = replace(
            curvature,
            parameters={name: replace(c, **no_diagonals) for name, c in curvature.parameters.items()},
        )
    activations = moments.pop(ACTIVATIONS, None)
    return replace(measured, moments=moments, activations=activations, curvature=curvature)


def moments_by_kind(measured: Measured) -> dict[str, MomentsBatch]:
    """Return the moments by kind, with those of the activations as one more kind."""
    by_kind = dict(measured.moments)
    if measured.activations is not None:
        by_kind[ACTIVATIONS] = measured.activations
    return by_kind


def _sums(measured: Measured) -> dict[Key, Tensor]:
    """The tensors of parameters' shapes, on the CPU, without those of sharded parameters."""
    sums: dict[Key, Tensor] = {}
    for kind, batch in moments_by_kind(measured).items():
        for name, moments in batch.parameters.items():
            for field in MOMENT_SUMS:
                x = getattr(moments, field)
                if x is not None and not is_part(x):
                    sums[kind, name, field] = x.detach().cpu()
    if measured.curvature is not None:
        for name, curvature in measured.curvature.parameters.items():
            for field in CURVATURE_SUMS:
                x = getattr(curvature, field)
                if x is not None:
                    sums["curvature", name, field] = x.detach().cpu()
    return sums
