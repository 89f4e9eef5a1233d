"""Inner products of the summed gradients of groups of inputs, for the gradient noise scale."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.problem.cotangents import data_cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.estimators.noise_scale import MIN_GROUPS
from fimprobe.statistics import GradientGroups

MAX_GROUPS = 16
"""Number of groups: more would take more memory, and know the error little better."""

TOO_LARGE = "the gradients of four groups of inputs take more memory than `memory_mb`"


def sum_by_groups(problem: Problem, chunk_size: int | None, names: list[str]) -> GradientGroups:
    """Return the inner products of gradients that are summed over groups of inputs.

    Args:
        problem: The measurement, with the labels of the data.
        chunk_size: Inputs that fit into the memory; None for all.
        names: The parameters.
    """
    parameters = {name: problem.parameters[name] for name in names}
    size = problem.batch.size
    size_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
    fitting = int(problem.memory_mb * 2**20 / max(1, size_bytes))
    count = min(MAX_GROUPS, size, fitting)
    if count < MIN_GROUPS:
        return GradientGroups(inner={}, sizes=[], reason=TOO_LARGE if fitting < MIN_GROUPS else "")
    bounds = [size * i // count for i in range(count + 1)]
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    for start, stop in zip(bounds, bounds[1:], strict=False):
        for name, gradient in _summed(problem, parameters, range(start, stop), chunk_size).items():
            sums[name].append(gradient.reshape(-1))
    inner = {}
    for name, vectors in sums.items():
        stacked = torch.stack(vectors).double()
        inner[name] = (stacked @ stacked.T).cpu()
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    return GradientGroups(inner=inner, sizes=sizes)


def _summed(
    problem: Problem, parameters: dict[str, torch.nn.Parameter], rows: range, chunk_size: int | None
) -> dict[str, Tensor]:
    """The gradients of log p(y|x) with labels of the data, summed over some inputs."""
    step = chunk_size or len(rows)
    totals: dict[str, Tensor] = {}
    for start in range(rows.start, rows.stop, step):
        piece = slice(start, min(start + step, rows.stop))
        h = problem.forward(problem.batch[piece])
        (vector,) = data_cotangents(problem, piece, h.detach()).vectors
        gradients = torch.autograd.grad(h, list(parameters.values()), vector, allow_unused=True)
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            part = torch.zeros_like(p) if gradient is None else gradient
            totals[name] = totals[name] + part if name in totals else part
    return totals
