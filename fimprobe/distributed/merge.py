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

from fimprobe.errors import FimprobeError
from fimprobe.jacobian_bounds.layer_bound import concatenate_bounds
from fimprobe.jacobian_bounds.layer_bounds import LayerBound
from fimprobe.likelihoods.base import OutputNorms
from fimprobe.model.fsdp import is_part
from fimprobe.statistics import Curvature, CurvatureBatch, Measured, Moments, MomentsBatch

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
    """What all processes add: activations only where all of them have the same shape.

    Raises:
        FimprobeError: where a parameter has another shape or type on another process.
    """
    found: Shapes = {}
    for key in sorted({key for part in parts for key in part}):
        known = [part[key] for part in parts if key in part]
        if key[0] == ACTIVATIONS and known != [known[0]] * len(parts):
            continue  # another length on another process: no common sum
        if len(set(known)) > 1:
            raise FimprobeError(f"parameter {key[1]!r} differs between the processes: {known}")
        found[key] = known[0]
    return found


def local_sums(measured: Measured, shapes: Shapes) -> dict[Key, Tensor]:
    """This process's tensors of these shapes, zeros for what it did not meet."""
    here = _sums(measured)
    return {
        key: here[key] if key in here else torch.zeros(shape, dtype=dtype)
        for key, (shape, dtype) in shapes.items()
    }


def sharded_sums(measured: Measured) -> dict[Key, Any]:
    """This process's parts of the sums of sharded parameters, which were added already."""
    return {
        (kind, name, "a2"): moments.a2
        for kind, batch in measured.moments.items()
        for name, moments in batch.parameters.items()
        if is_part(moments.a2)
    }


def drop_sums(measured: Measured) -> Measured:
    """The rest: small enough to be sent to every process, and on no device of this one."""
    no_entries: dict[str, Any] = dict.fromkeys(_PER_ENTRY) | {"a2": torch.empty(0)}
    no_diagonals: dict[str, Any] = dict.fromkeys(_CURVED_PER_ENTRY)

    def rest(m: Moments) -> Moments:
        gram = None if m.gram is None else m.gram.cpu()
        some = None if m.entries is None else m.entries.cpu()
        norms = m.squared_norms.cpu()
        powers = m.powers.cpu()
        return replace(m, gram=gram, squared_norms=norms, powers=powers, entries=some, **no_entries)

    moments = {
        kind: replace(batch, parameters={name: rest(m) for name, m in batch.parameters.items()})
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
    """One measurement from the parts :func:`drop_sums`, and the sums added over the processes."""
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    batches = [_batches(part) for part in parts]
    moments = {
        kind: _merge_batch(kind, [b[kind] for b in batches], sums)
        for kind in batches[0]
        if all(kind in b for b in batches)
    }
    activations = moments.pop(ACTIVATIONS, None)
    if activations is not None and not activations.parameters:
        activations = None
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
    bent = parts if curvature is not None else []
    kinks = list(dict.fromkeys(kink for part in bent for kink in part.kinks))
    return Measured(moments, curvature, norms, activations, seconds, notes, kinks)


def merge_bounds(parts: Sequence[Mapping[str, LayerBound]]) -> dict[str, LayerBound]:
    """Each layer's bounds for the whole batch."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: concatenate_bounds([p[name] for p in parts if name in p]) for name in names}


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
                x = getattr(moments, f)
                if x is not None and not is_part(x):
                    found[kind, name, f] = x.detach().cpu()
    if measured.curvature is not None:
        for name, curve in measured.curvature.parameters.items():
            for f in _CURVED_PER_ENTRY:
                if getattr(curve, f) is not None:
                    found["curvature", name, f] = getattr(curve, f).detach().cpu()
    return found


def _merge_batch(kind: str, parts: list[MomentsBatch], sums: Mapping[Key, Tensor]) -> MomentsBatch:
    names = _all_names([p.parameters for p in parts])
    if kind == ACTIVATIONS:
        names = [n for n in names if (kind, n, "a2") in sums]
    sizes = [p.batch_size for p in parts]

    def whole(name: str) -> Moments:
        found = [p.parameters.get(name) for p in parts]
        known = [m for m in found if m is not None]
        gram = None
        if all(m.gram is not None for m in known):
            gram = _rows([getattr(m, "gram", None) for m in found], sizes)
        norms = _rows([getattr(m, "squared_norms", None) for m in found], sizes)
        assert norms is not None
        powers = _rows([getattr(m, "powers", None) for m in found], sizes, 1)
        assert powers is not None
        added: dict[str, Any] = {"a2_sum": sum(m.a2_sum for m in known), "powers": powers}
        added |= {f: sums.get((kind, name, f)) for f in _PER_ENTRY}
        if is_part(added["a2"]):
            square = sum(m.a2_square for m in known)
        else:
            square = float(added["a2"].double().square().sum())
        if all(m.entries is not None for m in known):
            added["entries"] = sum(m.entries for m in known if m.entries is not None)
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
        inverse_weights=cat("inverse_weights"),
        seen_mass=_seen_mass(parts),
        fisher_trace=None
        if any(p.fisher_trace is None for p in parts)
        else sum(p.fisher_trace or 0.0 for p in parts),
        blocks=max((p.blocks for p in parts if p.blocks is not None), key=len, default=None),
        coverage=coverage,
    )


def _seen_mass(parts: Sequence[MomentsBatch]) -> float | None:
    """Of all processes' labels together."""
    known = [(p.seen_mass, p.fisher_trace or 0.0) for p in parts if p.seen_mass is not None]
    expected = sum(weight for _, weight in known)
    return sum(mass * weight for mass, weight in known) / expected if expected > 0 else None


def _merge_curvature(parts: list[CurvatureBatch], sums: Mapping[Key, Tensor]) -> CurvatureBatch:
    sizes, most = [len(p.weights) for p in parts], max(p.draws for p in parts)
    weights = _rows([p.weights for p in parts], sizes)
    assert weights is not None
    partners: dict[str, set[str]] = {}
    for part in parts:
        for name, others in part.partners.items():
            partners.setdefault(name, set()).update(others)

    def whole(name: str) -> Curvature:
        found = [p.parameters.get(name) for p in parts]
        known = [c for c in found if c is not None]
        # longer sequences have more passes, and of many passes only the diagonal is kept
        flat = min(c.block.dim() for c in known) == 3

        def seeds(field: str, dim: int) -> Tensor | None:
            given = []
            for part, c in zip(parts, found, strict=True):
                x = getattr(c, field, None)
                if x is None and c is not None and field == "joint":
                    x = c.block  # a parameter that does not meet itself here
                if x is not None and dim == 1 and flat and x.dim() == 4:
                    x = x.diagonal(dim1=-2, dim2=-1)
                for d in range(dim + 1, 2 if dim == 0 or x is None else x.dim()):
                    x = None if x is None else _with_room(x, d, part.draws, most)
                given.append(x)
            return _rows(given, sizes, dim)

        made: dict[str, Any] = {f: seeds(f, 0) for f in ("trace", "square", "probe_squares")}
        made |= {f: seeds(f, 1) for f in ("block", "whole", "joint")}
        if all(c.joint is None for c in known):
            made["joint"] = None
        made["signs"] = _rows([getattr(c, "signs", None) for c in found], sizes, 1)
        made |= {f: sums.get(("curvature", name, f)) for f in _CURVED_PER_ENTRY}
        return Curvature(**made)

    return replace(
        parts[0],
        parameters={name: whole(name) for name in _all_names([p.parameters for p in parts])},
        draws=most,
        weights=weights,
        partners=partners,
    )


def _all_names(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """In the order of the process that knows most of them."""
    longest = max(parts, key=len)
    return list(dict.fromkeys([*longest, *(name for part in parts for name in part)]))


def _rows(parts: Sequence[Tensor | None], sizes: list[int], dim: int = 0) -> Tensor | None:
    """The processes' rows one after another.

    Zeros where a process met no such parameter, and for the passes that a longer sequence has more.
    """
    known = [p for p in parts if p is not None]
    if not known:
        return None
    shape = [max(p.shape[d] for p in known) for d in range(known[0].dim())]
    shape[dim] = sum(sizes)
    whole = known[0].new_zeros(shape)
    for p, rows in zip(parts, whole.split(sizes, dim), strict=True):
        if p is not None:
            rows[tuple(slice(n) for n in p.shape)] = p
    return whole


def _with_room(x: Tensor, dim: int, draws: int, most: int) -> Tensor:
    """Zeros for seeds that other processes have; the seeds of the bounds stay behind them."""
    shape = list(x.shape)
    shape[dim] = most - draws
    later = x.shape[dim] - draws
    return torch.cat([x.narrow(dim, 0, draws), x.new_zeros(shape), x.narrow(dim, draws, later)], dim)
