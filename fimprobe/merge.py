"""Several processes' measurements of their shares of a batch, as one measurement of the whole.

Everything that is measured is a sum over samples or a row for each sample: sums are added, rows are
put one after another in the processes' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.chain import LayerBound
from fimprobe.engines.chain import _joined as joined
from fimprobe.types import (
    Curvature,
    CurvatureBatch,
    Measured,
    Moments,
    MomentsBatch,
    OutputNorms,
)

Key = tuple[str, str, str]
"""A tensor of a parameter's shape: kind of seeds, parameter, field."""
ACTIVATIONS = "activations"
_PER_ENTRY = ("a2", "a4", "q", "r")
_CURVED_PER_ENTRY = ("diagonal", "diagonal_square")


Shapes = dict[Key, tuple[torch.Size, torch.dtype]]


def shapes_of(measured: Measured) -> Shapes:
    """Of the tensors that are to be added."""
    return {key: (x.shape, x.dtype) for key, x in _sums(measured).items()}


def common_shapes(parts: Sequence[Shapes]) -> Shapes:
    """What all processes add: activations only where all of them have the same shape."""
    found: Shapes = {}
    for key in sorted({key for part in parts for key in part}):
        known = [part[key] for part in parts if key in part]
        if key[0] != ACTIVATIONS or known == [known[0]] * len(parts):
            found[key] = known[0]
    return found


def take_sums(measured: Measured, shapes: Shapes) -> dict[Key, Tensor]:
    """This process's tensors of these shapes, zeros for what it did not meet."""
    here = _sums(measured)
    return {
        key: here[key] if key in here else torch.zeros(shape, dtype=dtype)
        for key, (shape, dtype) in shapes.items()
    }


def without_sums(measured: Measured) -> Measured:
    """The rest: small enough to be sent to every process."""
    no_entries: dict[str, Any] = dict.fromkeys(_PER_ENTRY) | {"a2": torch.empty(0)}
    no_diagonals: dict[str, Any] = dict.fromkeys(_CURVED_PER_ENTRY)
    moments = {
        kind: replace(
            batch,
            parameters={name: replace(m, **no_entries) for name, m in batch.parameters.items()},
        )
        for kind, batch in _batches(measured).items()
    }
    curvature = measured.curvature
    if curvature is not None:
        curvature = replace(
            curvature,
            parameters={name: replace(c, **no_diagonals) for name, c in curvature.parameters.items()},
        )
    activations = moments.pop(ACTIVATIONS, None)
    return replace(measured, moments=moments, activations=activations, curvature=curvature)


def merge(parts: Sequence[Measured], sums: Mapping[Key, Tensor]) -> Measured:
    """One measurement from the parts :func:`without_sums`, and the sums added over the processes."""
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    batches = [_batches(part) for part in parts]
    moments = {
        kind: _merge_batch(kind, [b[kind] for b in batches], sums)
        for kind in batches[0]
        if all(kind in b for b in batches)
    }
    activations = moments.pop(ACTIVATIONS, None)
    curvatures = [part.curvature for part in parts]
    curvature = None
    if all(c is not None for c in curvatures):
        curvature = _merge_curvature([c for c in curvatures if c is not None], sums)
    norms = None
    if all(part.norms is not None for part in parts):
        norms = OutputNorms(
            *(torch.cat([getattr(p.norms, f.name) for p in parts]) for f in fields(OutputNorms))
        )
    seconds = {
        key: max(part.seconds.get(key, 0.0) for part in parts)
        for key in dict.fromkeys(k for part in parts for k in part.seconds)
    }
    kinks = list(dict.fromkeys(kink for part in parts for kink in part.kinks))
    return Measured(moments, curvature, norms, activations, seconds, notes, kinks)


def merge_bounds(parts: Sequence[Mapping[str, LayerBound]]) -> dict[str, LayerBound]:
    """Each layer's bounds for the whole batch."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: joined([p[name] for p in parts if name in p]) for name in names}


def _batches(measured: Measured) -> dict[str, MomentsBatch]:
    """The moments by kind, those of the activations beside them."""
    found = dict(measured.moments)
    if measured.activations is not None:
        found[ACTIVATIONS] = measured.activations
    return found


def _sums(measured: Measured) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}
    for kind, batch in _batches(measured).items():
        for name, moments in batch.parameters.items():
            for f in _PER_ENTRY:
                if getattr(moments, f) is not None:
                    found[kind, name, f] = getattr(moments, f).detach().cpu()
    if measured.curvature is not None:
        for name, curve in measured.curvature.parameters.items():
            for f in _CURVED_PER_ENTRY:
                if getattr(curve, f) is not None:
                    found["curvature", name, f] = getattr(curve, f).detach().cpu()
    return found


def _merge_batch(kind: str, parts: list[MomentsBatch], sums: Mapping[Key, Tensor]) -> MomentsBatch:
    names = _all_names([p.parameters for p in parts])
    if kind == ACTIVATIONS:  # another length on another process: no common sum
        names = [n for n in names if (kind, n, "a2") in sums]
    sizes = [p.batch_size for p in parts]

    def whole(name: str) -> Moments:
        found = [p.parameters.get(name) for p in parts]
        known = [m for m in found if m is not None]
        gram = _rows([getattr(m, "gram", None) for m in found], sizes)
        norms = _rows([getattr(m, "squared_norms", None) for m in found], sizes)
        assert norms is not None
        added: dict[str, Any] = {
            f: sum(getattr(m, f) for m in known)
            for f in ("a2_sum", "a4_sum", "q_sum", "r_sum", "top_sum")
        }
        added |= {f: sums.get((kind, name, f)) for f in _PER_ENTRY}
        square = float(added["a2"].double().square().sum())
        return Moments(squared_norms=norms, gram=gram, a2_square=square, **added)

    def cat(field: str) -> Tensor | None:
        return _rows([getattr(p, field) for p in parts], sizes)

    coverage = dict(parts[0].coverage)
    for part in parts[1:]:
        for name, how in part.coverage.items():
            if coverage.get(name, "left out").startswith("left out"):
                coverage[name] = how
    return replace(
        parts[0],
        parameters={name: whole(name) for name in names},
        batch_size=sum(sizes),
        second=cat("second"),
        fourth=cat("fourth"),
        coverage=coverage,
    )


def _merge_curvature(parts: list[CurvatureBatch], sums: Mapping[Key, Tensor]) -> CurvatureBatch:
    sizes = [len(p.weights) for p in parts]
    partners: dict[str, set[str]] = {}
    for part in parts:
        for name, others in part.partners.items():
            partners.setdefault(name, set()).update(others)

    def whole(name: str) -> Curvature:
        found = [p.parameters.get(name) for p in parts]

        def cat(field: str, dim: int) -> Tensor | None:
            return _rows([getattr(c, field, None) for c in found], sizes, dim)

        made: dict[str, Any] = {f: cat(f, 0) for f in ("trace", "square", "probe_squares")}
        made |= {f: cat(f, 1) for f in ("block", "whole", "signs", "joint")}
        made |= {f: sums.get(("curvature", name, f)) for f in _CURVED_PER_ENTRY}
        return Curvature(**made)

    return replace(
        parts[0],
        parameters={name: whole(name) for name in _all_names([p.parameters for p in parts])},
        weights=torch.cat([p.weights for p in parts]),
        partners=partners,
    )


def _all_names(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """In the order of the process that knows most of them."""
    longest = max(parts, key=len)
    return list(dict.fromkeys([*longest, *(name for part in parts for name in part)]))


def _rows(parts: Sequence[Tensor | None], sizes: list[int], dim: int = 0) -> Tensor | None:
    """The processes' rows one after another; zeros where a process met no such parameter."""
    like = next((p for p in parts if p is not None), None)
    if like is None:
        return None

    def zeros(size: int) -> Tensor:
        shape = list(like.shape)
        shape[dim] = size
        return like.new_zeros(shape)

    return torch.cat([zeros(n) if p is None else p for p, n in zip(parts, sizes, strict=True)], dim)
