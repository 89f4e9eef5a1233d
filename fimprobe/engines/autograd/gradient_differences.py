"""Second derivatives by differences of gradients, for graphs that double backward may not know.

A custom ``torch.autograd.Function`` may leave its second derivative out without an error: under
``once_differentiable``, or where its backward detaches or calls a foreign kernel. Both the engine and
plain double backward then return zero. Differences of gradients need first derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.engines.problem.label_cotangents import label_cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.graph import nodes_behind

_AGREEMENT = 0.05
"""Relative difference of two step sizes from which the differences are trusted."""

_STEP_RATIO = 4.0


def has_custom_functions(problem: Problem) -> bool:
    """Return whether a custom ``torch.autograd.Function`` is in the graph of one sample."""
    outputs = problem.forward(problem.batch[:1])
    return any(isinstance(node, BackwardCFunction) for node in nodes_behind([outputs.grad_fn]))


def difference_norms(problem: Problem) -> dict[str, Tensor]:
    """Estimate ‖(R_b u)_θ‖² of each parameter for the engine's first direction u.

    R_b u ≈ (g_b(θ + εu) - g_b(θ - εu)) / 2ε with the cotangents at the outputs held fixed.

    Returns:
        Norms [B] by parameter, float64; NaN for a sample where two step sizes do not agree, as at a
        kink or within rounding.
    """
    direction = {
        name: random_direction(p, f"direction 0 {name}", problem.draws.seed)
        for name, p in problem.parameters.items()
    }
    steps = _steps(problem)
    norms: dict[str, list[Tensor]] = {name: [] for name in problem.parameters}
    for b in range(problem.batch.size):
        h = problem.forward(problem.batch[b : b + 1]).detach()
        (score,) = label_cotangents(problem, slice(b, b + 1), h).vectors
        coarse, fine = (_differences(problem, direction, score, b, step) for step in steps)
        for name in norms:
            rough, value = coarse[name], fine[name]
            agree = float((rough - value).norm()) <= _AGREEMENT * float(value.norm())
            norms[name].append(value.square().sum().cpu() if agree else torch.tensor(torch.nan))
    return {name: torch.stack(values).double() for name, values in norms.items()}


def _steps(problem: Problem) -> tuple[float, float]:
    """Two step sizes: rounding and the third derivative weigh alike at the smaller one."""
    dtypes = {p.dtype for p in problem.parameters.values()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    fine = 0.3 * rounding ** (1 / 3)
    return _STEP_RATIO * fine, fine


def _differences(
    problem: Problem, direction: Mapping[str, Tensor], score: Tensor, b: int, step: float
) -> dict[str, Tensor]:
    """R_b u by name, float64.

    Args:
        problem: A few samples.
        direction: u by parameter.
        score: The cotangent at the outputs [1, ...].
        b: The sample.
        step: ε.
    """
    gradients = []
    for sign in (1, -1):
        with _moved(problem.parameters, direction, sign * step):
            h = problem.forward(problem.batch[b : b + 1])
            gradients.append(vjp([h], [score], list(problem.parameters.values()), retain_graph=False))
    return {
        name: torch.zeros_like(p, dtype=torch.float64)
        if plus is None or minus is None
        else (plus.double() - minus.double()) / (2 * step)
        for (name, p), plus, minus in zip(problem.parameters.items(), *gradients, strict=True)
    }


@contextmanager
def _moved(
    parameters: Mapping[str, nn.Parameter], direction: Mapping[str, Tensor], step: float
) -> Iterator[None]:
    """Move the twin's parameters inside the context; they come back bit by bit."""
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(direction[name], alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])
