"""The standard error of a weighted sum of the diagonal's entries.

Entries are correlated, because they share inputs and labels. Their covariances are not stored (there
are P² of them). They are modelled by one correlation inside each layer and one between layers, which
make the errors of all layers' traces and of the whole trace come out as measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fimprobe.fisher.records import FisherRecord


def linear_error(fisher: FisherRecord, weights: Mapping[str, Tensor]) -> float | None:
    """Return the standard error of Σ_i c_i F̂_ii; None where that of the trace is not known.

    Args:
        fisher: F̂ with its errors.
        weights: c by parameter, in its shape.
    """
    if fisher.total.std_error is None:
        return None
    layers: dict[str, list[str]] = {}
    for name in fisher.diagonal:
        layers.setdefault(name.rpartition(".")[0] or "(model)", []).append(name)
    variances, unit_variances = [], []
    for layer, names in layers.items():
        weighted = _sums(fisher, names, weights)
        unit = _sums(fisher, names, None)
        trace_error = fisher.layers[layer].std_error or 0.0
        correlation = _share(trace_error**2 - unit[1], unit[0] ** 2 - unit[1])
        variances.append(weighted[1] + correlation * max(weighted[0] ** 2 - weighted[1], 0.0))
        unit_variances.append(unit[1] + correlation * max(unit[0] ** 2 - unit[1], 0.0))
    across = _cross(variances)
    trace_square = (fisher.total.std_error or 0.0) ** 2
    between = _share(trace_square - sum(unit_variances), _cross(unit_variances))
    return float((sum(variances) + between * across) ** 0.5)


def _sums(
    fisher: FisherRecord, names: list[str], weights: Mapping[str, Tensor] | None
) -> tuple[float, float]:
    """Σ|c_i| s_i and Σ c_i² s_i² of some parameters; c = 1 without weights."""
    first = second = 0.0
    for name in names:
        scaled = fisher.std_error[name].double()
        if weights is not None:
            scaled = scaled * weights[name].to(scaled.device, torch.float64).abs()
        first += float(scaled.sum())
        second += float(scaled.square().sum())
    return first, second


def _cross(variances: list[float]) -> float:
    """Σ over pairs of layers of the product of their standard errors, twice."""
    return sum(v**0.5 for v in variances) ** 2 - sum(variances)


def _share(part: float, whole: float) -> float:
    """part/whole inside [0, 1]."""
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
