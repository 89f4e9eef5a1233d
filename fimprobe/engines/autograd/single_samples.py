"""Gradients and second derivatives of samples evaluated alone, by plain autograd.

No hook, no rule, no batch: what the engine computes for a batch is verified against these numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.curvature.double_backward import use_differentiable_attention
from fimprobe.engines.moments.contraction import at_least_float32
from fimprobe.engines.primitives.products import vjp
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.engines.problem.label_cotangents import label_cotangents
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import BatchError

SingleGradient = tuple[Tensor, float] | None
"""A sample's gradient (of a sharded parameter, this process's rows) and its squared norm.

None if the outputs do not depend on the parameter.
"""


def single_sample_gradients(
    problem: Problem,
) -> tuple[dict[str, list[SingleGradient]], Tensor]:
    """Evaluate each sample alone, with the label that the batch draws for it.

    Returns:
        For each parameter, the gradient of each of the B samples, and all outputs [B, ...].

    Raises:
        BatchError: If a gradient is not finite.
    """
    parameters = list(problem.parameters.values())
    gradients: dict[str, list[SingleGradient]] = {name: [] for name in problem.parameters}
    outputs = []
    for b in range(problem.batch.size):
        h = problem.forward(problem.batch[b : b + 1])
        uniforms = problem.draws.uniforms_for(slice(b, b + 1), problem.batch.size, h.shape)
        label = problem.likelihood.quantile(h.detach(), uniforms[:, 0].to(h.device))
        score = problem.likelihood.score(h.detach(), label).to(h.dtype)
        of_sample: Mapping[str, SingleGradient] = {}
        if h.requires_grad and problem.shards is not None:
            of_sample = problem.shards.gradients(h, problem.parameters, score)
        elif h.requires_grad:
            pulled_back = vjp([h], [score], parameters, retain_graph=False)
            of_sample = {
                name: None if g is None else (g, squared_norm(g))
                for name, g in zip(problem.parameters, pulled_back, strict=True)
            }
            check_finite(known[1] for known in of_sample.values() if known is not None)
        for name in problem.parameters:
            gradients[name].append(of_sample.get(name))
        outputs.append(h.detach())
    return gradients, torch.cat(outputs)


def squared_norm(g: Tensor) -> float:
    """Return ‖g‖², without a float64 copy of g, which would cost as much as g itself."""
    values = g.coalesce().values() if g.is_sparse else g
    norm = float(torch.linalg.vector_norm(at_least_float32(values)))
    if 1e-12 < norm < 1e15:  # the squares are in the range of float32
        return norm**2
    return float(values.double().square().sum())


def check_finite(norms: Iterable[float]) -> None:
    """Check the norms of a sample's gradients, whose outputs are finite.

    Args:
        norms: Those of all parameters.

    Raises:
        BatchError: If one is not finite.
    """
    if not all(map(math.isfinite, norms)):
        raise BatchError(
            "the gradients of a sample are not finite (NaN or infinite) although its outputs are, as "
            "at the square root or the norm of zero. Add a small constant before such an operation."
        )


def single_sample_curvature(problem: Problem) -> dict[str, Tensor]:
    """‖(R_b u)_θ‖² [B] of each parameter, for the engine's first direction u.

    R_b u is the derivative of ⟨g_b, u⟩ with the gradient g_b of sample b.

    Raises:
        RuntimeError: If an operation of the model has no second derivative.
    """
    parameters = list(problem.parameters.values())
    direction = [
        random_direction(p, f"direction 0 {n}", problem.draws.seed)
        for n, p in problem.parameters.items()
    ]
    norms: dict[str, list[Tensor]] = {n: [] for n in problem.parameters}
    for b in range(problem.batch.size):
        products: Any = [None] * len(parameters)
        with use_differentiable_attention(), differentiable_bags(problem.twin):
            h = problem.forward(problem.batch[b : b + 1])
            (score,) = label_cotangents(problem, slice(b, b + 1), h.detach()).vectors
            if h.requires_grad:
                gradients = vjp([h], [score], parameters, create_graph=True)
                inner_products = [
                    (g * u).sum()
                    for g, u in zip(gradients, direction, strict=True)
                    if g is not None and g.requires_grad
                ]
                if inner_products:
                    total = torch.stack(inner_products).sum()
                    products = torch.autograd.grad(total, parameters, allow_unused=True)
        for name, product in zip(problem.parameters, products, strict=True):
            zero = torch.zeros((), dtype=torch.float64)
            norms[name].append(zero if product is None else product.double().square().sum().cpu())
    return {name: torch.stack(of_samples) for name, of_samples in norms.items()}


@contextmanager
def differentiable_bags(twin: nn.Module) -> Iterator[None]:
    """Let embedding bags look up and sum inside the context, which torch differentiates twice."""
    bags = [
        m
        for m in twin.modules()
        if type(m) is nn.EmbeddingBag and m.mode != "max" and "forward" not in m.__dict__
    ]
    for bag in bags:
        bag.forward = functools.partial(_sum_bags, bag)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for bag in bags:
            del bag.__dict__["forward"]


def _sum_bags(
    bag: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Outputs of an embedding bag, as the sum or mean of looked-up rows.

    Args:
        bag: The layer.
        input: Indices [B, L], or those of all bags [N] with ``offsets``.
        offsets: Where each bag begins [B]; a last entry N is left out with ``include_last_offset``.
        per_sample_weights: Factors of the rows, of the shape of ``input``.

    Returns:
        [B, D].
    """
    rows = bag.weight[input]
    kept = torch.ones_like(input) if bag.padding_idx is None else input != bag.padding_idx
    kept = kept.to(rows.dtype)
    factors = kept if per_sample_weights is None else kept * per_sample_weights
    rows = rows * factors.unsqueeze(-1)
    if offsets is None:
        total, count = rows.sum(1), kept.sum(1)
    else:
        starts = offsets[:-1] if bag.include_last_offset else offsets
        places = torch.arange(len(input), device=input.device)
        index = torch.bucketize(places, starts, right=True) - 1
        total = rows.new_zeros(len(starts), rows.shape[-1]).index_add(0, index, rows)
        count = kept.new_zeros(len(starts)).index_add(0, index, kept)
    return total / count.clamp(min=1).unsqueeze(-1) if bag.mode == "mean" else total
