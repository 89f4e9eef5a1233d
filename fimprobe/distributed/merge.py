"""Merge the statistics of several processes, each of its share of a batch, to those of the batch.

Every statistic is a sum over samples or has one row for each sample: sums are added, rows are
concatenated in the order of the processes. Sums of a parameter's shape are added first, on their own:
see :mod:`fimprobe.distributed.parameter_sums`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.distributed.parameter_sums import (
    ACTIVATIONS,
    CURVATURE_SUMS,
    MOMENT_SUMS,
    Key,
    moments_by_kind,
)
from fimprobe.jacobian_bounds.layer_bound import concatenate_bounds
from fimprobe.jacobian_bounds.layer_bounds import LayerBound
from fimprobe.likelihoods.base import OutputNorms
from fimprobe.model.fsdp.placement import is_part
from fimprobe.statistics import Curvature, CurvatureBatch, Measured, Moments, MomentsBatch, SpotChecks


def merge(shares: Sequence[Measured], sums: Mapping[Key, Tensor]) -> Measured:
    """Return the statistics of the whole batch.

    Args:
        shares: :func:`drop_sums` of each process's statistics, in the order of processes.
        sums: Tensors of the parameters' shapes, added over the processes.
    """
    by_kind = [moments_by_kind(share) for share in shares]
    moments = {
        kind: _merge_moments(kind, [batches[kind] for batches in by_kind], sums)
        for kind in by_kind[0]
        if all(kind in batches for batches in by_kind)
    }
    activations = moments.pop(ACTIVATIONS, None)
    if activations is not None and not activations.parameters:
        activations = None
    curvatures = [share.curvature for share in shares if share.curvature is not None]
    curvature = _merge_curvature(curvatures, sums) if len(curvatures) == len(shares) else None
    norms = None
    if all(share.norms is not None for share in shares):
        norms = OutputNorms(
            **{
                f.name: torch.cat([getattr(share.norms, f.name) for share in shares])
                for f in fields(OutputNorms)
            }
        )
    seconds = {
        key: max(share.seconds.get(key, 0.0) for share in shares)
        for key in dict.fromkeys(k for share in shares for k in share.seconds)
    }
    measured_twice = curvature is not None or shares[0].spot_checks is not None
    kinks = [] if not measured_twice else [kink for share in shares for kink in share.kinks]
    return Measured(
        moments=moments,
        curvature=curvature,
        spot_checks=_merge_spot_checks(shares),
        norms=norms,
        activations=activations,
        seconds=seconds,
        notes=list(dict.fromkeys(note for share in shares for note in share.notes)),
        kinks=list(dict.fromkeys(kinks)),
    )


def merge_bounds(shares: Sequence[Mapping[str, LayerBound]]) -> dict[str, LayerBound]:
    """Return each layer's bounds for the whole batch, from those of each process's share."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: concatenate_bounds([s[name] for s in shares if name in s]) for name in names}


def _merge_moments(kind: str, shares: list[MomentsBatch], sums: Mapping[Key, Tensor]) -> MomentsBatch:
    names = _all_names([share.parameters for share in shares])
    if kind == ACTIVATIONS:
        names = [n for n in names if (kind, n, "a2") in sums]
    sizes = [share.batch_size for share in shares]

    def concatenated(field: str) -> Tensor | None:
        return _concatenate([getattr(share, field) for share in shares], sizes)

    def of_parameter(name: str) -> Moments:
        tensors = {field: sums.get((kind, name, field)) for field in MOMENT_SUMS}
        return _merge_parameter([s.parameters.get(name) for s in shares], sizes, tensors)

    # a parameter that one process did not use may be used by another one
    coverage = dict(shares[0].coverage)
    for share in shares[1:]:
        for name, how in share.coverage.items():
            if coverage.get(name, "left out").startswith("left out"):
                coverage[name] = how
    traces = [share.fisher_trace for share in shares if share.fisher_trace is not None]
    return replace(
        shares[0],
        parameters={name: of_parameter(name) for name in names},
        batch_size=sum(sizes),
        square_weights=concatenated("square_weights"),
        quartic_weights=concatenated("quartic_weights"),
        inverse_weights=concatenated("inverse_weights"),
        seen_mass=_seen_mass(shares),
        fisher_trace=sum(traces) if len(traces) == len(shares) else None,
        blocks=max((s.blocks for s in shares if s.blocks is not None), key=len, default=None),
        coverage=coverage,
    )


def _merge_parameter(shares: list[Moments | None], sizes: list[int], sums: dict[str, Any]) -> Moments:
    """The moments of one parameter; None for a process that did not use it."""
    known = [m for m in shares if m is not None]

    def concatenated(field: str, dim: int = 0) -> Tensor:
        """Return a field of all samples of the batch.

        Args:
            field: A field of :class:`Moments` that is known in some process.
            dim: The dimension of the samples.

        Returns:
            The processes' tensors along ``dim``, zeros for a process without the parameter.
        """
        rows = _concatenate([getattr(m, field, None) for m in shares], sizes, dim)
        assert rows is not None
        return rows

    if is_part(sums["a2"]):  # rows of one process: the square needs those of all
        a2_square = sum(m.a2_square for m in known)
    else:
        a2_square = float(sums["a2"].double().square().sum())
    entries = [m.entries for m in known if m.entries is not None]
    return Moments(
        a2_sum=sum(m.a2_sum for m in known),
        a2_square=a2_square,
        powers=concatenated("powers", 1),
        squared_norms=concatenated("squared_norms"),
        gram=concatenated("gram") if all(m.gram is not None for m in known) else None,
        entries=sum(entries[1:], entries[0]) if len(entries) == len(known) else None,
        **sums,
    )


def _seen_mass(shares: Sequence[MomentsBatch]) -> float | None:
    """The seen mass of all processes' labels, weighted by its expectation in each process."""
    known = [(s.seen_mass, s.fisher_trace or 0.0) for s in shares if s.seen_mass is not None]
    expected = sum(weight for _, weight in known)
    return sum(mass * weight for mass, weight in known) / expected if expected > 0 else None


def _merge_curvature(shares: list[CurvatureBatch], sums: Mapping[Key, Tensor]) -> CurvatureBatch:
    sizes, draws = [len(share.weights) for share in shares], max(share.draws for share in shares)
    weights = _concatenate([share.weights for share in shares], sizes)
    assert weights is not None
    partners: dict[str, set[str]] = {}
    for share in shares:
        for name, others in share.partners.items():
            partners.setdefault(name, set()).update(others)

    def of_parameter(name: str) -> Curvature:
        curvatures = [share.parameters.get(name) for share in shares]
        known = [c for c in curvatures if c is not None]
        # longer sequences have more passes, and of many passes only the diagonal is kept
        diagonal_only = min(c.block.dim() for c in known) == 3

        def concatenated(field: str, dim: int) -> Tensor | None:
            """Return a field of all samples of the batch; None if no process has it.

            Args:
                field: A field of :class:`Curvature`.
                dim: The dimension of the samples.

            Returns:
                The processes' tensors along ``dim``. Zeros fill in for a process without the
                parameter and for passes that only longer sequences have.
            """
            rows: list[Tensor | None] = []
            for share, c in zip(shares, curvatures, strict=True):
                x = getattr(c, field, None)
                if x is None and c is not None and field == "joint":
                    x = c.block  # no interacting uses in this process
                if x is not None:
                    if dim == 1 and diagonal_only and x.dim() == 4:
                        x = x.diagonal(dim1=-2, dim2=-1)
                    for d in range(dim + 1, 2 if dim == 0 else x.dim()):
                        x = _pad_draws(x, d, share.draws, draws)
                rows.append(x)
            return _concatenate(rows, sizes, dim)

        merged: dict[str, Any] = {f: concatenated(f, 0) for f in ("trace", "square", "probe_squares")}
        merged |= {f: concatenated(f, 1) for f in ("block", "whole", "joint")}
        if all(c.joint is None for c in known):
            merged["joint"] = None
        merged["signs"] = _concatenate([getattr(c, "signs", None) for c in curvatures], sizes, 1)
        merged |= {f: sums.get(("curvature", name, f)) for f in CURVATURE_SUMS}
        return Curvature(**merged)

    return replace(
        shares[0],
        parameters={n: of_parameter(n) for n in _all_names([s.parameters for s in shares])},
        draws=draws,
        weights=weights,
        partners=partners,
    )


def _merge_spot_checks(shares: Sequence[Measured]) -> SpotChecks | None:
    """The checks of all processes, each of which estimates V2 of its own inputs."""
    checks = [share.spot_checks for share in shares if share.spot_checks is not None]
    if len(checks) < len(shares):
        return None
    sizes = [share.moments["i1"].batch_size for share in shares]
    strata = [
        replace(stratum, values=stratum.values * (size / sum(sizes)))
        for of_process, size in zip(checks, sizes, strict=True)
        for stratum in of_process.strata
    ]
    failure = next((c.failure for c in checks if c.failure), "")
    return SpotChecks(strata=strata, failure=failure)


def _all_names(shares: Sequence[Mapping[str, Any]]) -> list[str]:
    """All names, in the order of the process that has most of them."""
    longest = max(shares, key=len)
    return list(dict.fromkeys([*longest, *(name for share in shares for name in share)]))


def _concatenate(tensors: Sequence[Tensor | None], sizes: list[int], dim: int = 0) -> Tensor | None:
    """The processes' tensors one after another along ``dim``, of which each has ``sizes`` rows.

    Zeros fill in for a parameter that a process did not use, and for the passes that a longer
    sequence has more.
    """
    known = [x for x in tensors if x is not None]
    if not known:
        return None
    shape = [max(x.shape[d] for x in known) for d in range(known[0].dim())]
    shape[dim] = sum(sizes)
    result = known[0].new_zeros(shape)
    for x, rows in zip(tensors, result.split(sizes, dim), strict=True):
        if x is not None:
            rows[tuple(slice(n) for n in x.shape)] = x
    return result


def _pad_draws(x: Tensor, dim: int, draws: int, padded_draws: int) -> Tensor:
    """Insert zeros for label scores that other processes have; the bounds' cotangents follow them."""
    shape = list(x.shape)
    shape[dim] = padded_draws - draws
    later = x.shape[dim] - draws
    return torch.cat([x.narrow(dim, 0, draws), x.new_zeros(shape), x.narrow(dim, draws, later)], dim)
