"""Moments of every trainable parameter, with all draws of a chunk in one backward pass."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from fimprobe.engines.backpack.derivatives import trainable_modules
from fimprobe.engines.backpack.first_order_rules import ChunkContext, MomentsExtension, ParameterSums
from fimprobe.engines.backpack.hooks import extended
from fimprobe.engines.backpack.sum_checks import check_copies, check_total
from fimprobe.engines.problem.cotangents import check_num_passes
from fimprobe.engines.problem.label_cotangents import label_cotangents, seen_mass
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.weights import PassWeights
from fimprobe.errors import FimprobeError
from fimprobe.statistics import MomentsBatch


def moments_in_domain(problem: Problem) -> MomentsBatch:
    """The moments of a problem inside the domain.

    The samples of a chunk are repeated S times along the batch. Σ g of every parameter is compared
    with its gradient by plain autograd.

    Raises:
        FimprobeError: If the comparison fails, or one sample needs more than ``memory_mb``.
    """
    size = problem.batch.size
    draws, step = _draws_and_chunk_size(problem)
    sums: dict[str, ParameterSums] = {}
    exact: list[PassWeights] = []
    inverse: list[Tensor] = []
    score_masses: list[Tensor] = []
    for start in range(0, size, step):
        chunk = ChunkContext(
            rows=slice(start, min(start + step, size)),
            size=size,
            draws=draws,
            diagonals=problem.diagonals,
            max_bytes=problem.memory_mb * 2**17,
        )
        for name, chunk_sums in _chunk_sums(problem, chunk).items():
            sums[name] = sums[name] + chunk_sums if name in sums else chunk_sums
        if chunk.weights is not None and chunk.weights.are_size_biased:
            inverse.append(chunk.weights.quartic)
        elif chunk.weights is not None and not chunk.weights.from_model:
            exact.append(chunk.weights)
        if chunk.score_mass is not None:
            score_masses.append(chunk.score_mass)
    mass = torch.stack(score_masses).sum(0).tolist() if score_masses else None
    square_weights = [w.square for w in exact if w.square is not None]
    return MomentsBatch(
        parameters={n: sums[n].finish(p) for n, p in problem.parameters.items() if n in sums},
        batch_size=size,
        draws=problem.draws.count,
        square_weights=torch.cat(square_weights).cpu() if exact else None,
        quartic_weights=torch.cat([w.quartic for w in exact]).cpu() if exact else None,
        blocks=torch.tensor(exact[0].block) if exact else None,
        inverse_weights=torch.cat(inverse).cpu() if inverse else None,
        seen_mass=seen_mass(problem, mass),
        fisher_trace=None if mass is None else mass[1],
        coverage=_coverage(problem, set(sums)),
    )


def _chunk_sums(problem: Problem, chunk: ChunkContext) -> dict[str, ParameterSums]:
    """Sums of the parameters on which the chunk's outputs depend; sets its weights."""
    copies = problem.batch[torch.arange(chunk.rows.start, chunk.rows.stop).repeat(chunk.draws)]
    layers = [module for _, module in trainable_modules(problem.twin)]
    parameters = problem.parameters
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    with extended(layers, MomentsExtension(chunk)), torch.enable_grad():
        h = problem.forward(copies)
        cotangents = label_cotangents(problem, chunk.rows, h.detach()[: chunk.samples])
        chunk.weights, chunk.score_mass = cotangents.weights, cotangents.score_mass
        check_copies(h.detach(), chunk.samples)
        if h.requires_grad:
            gradients = torch.autograd.grad(
                h, list(parameters.values()), torch.cat(cotangents.vectors), allow_unused=True
            )
    sums = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is not None:
            check_total(name, chunk.sums.get(id(parameter)), gradient, copies.size)
            sums[name] = chunk.sums[id(parameter)]
    return sums


def _draws_and_chunk_size(problem: Problem) -> tuple[int, int]:
    """Backward passes of each sample, and how many samples fit into ``memory_mb`` at once."""
    h, saved = _one_forward(problem)
    draws = problem.draws.count
    if draws is None:
        check_num_passes(problem, h, 0.0, math.inf)  # the memory is checked below
        draws = problem.likelihood.count_passes(h)
    bytes_each = 3 * draws * max(saved, 1)  # saved tensors, their gradients, BackPACK's references
    size = int(problem.memory_mb * 2**20 / bytes_each)
    if size < 1:
        raise FimprobeError(
            f"{draws} draws of one sample take about {bytes_each / 2**20:.2g} MB in "
            f"engine='backpack', more than memory_mb={problem.memory_mb:.4g}; pass "
            "engine='autograd', fewer draws or a larger memory_mb"
        )
    return draws, min(size, problem.batch.size)


def _one_forward(problem: Problem) -> tuple[Tensor, int]:
    """One sample's outputs, and the bytes that autograd saves for it in addition to parameters."""
    seen: set[int] = {p.untyped_storage().data_ptr() for p in problem.twin.parameters()}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        with suppress(RuntimeError, NotImplementedError):  # tensors without storage
            if x.untyped_storage().data_ptr() not in seen:
                seen.add(x.untyped_storage().data_ptr())
                total += x.untyped_storage().nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        h = problem.forward(problem.batch[:1])
    return h, total


def _coverage(problem: Problem, measured: set[str]) -> dict[str, str]:
    """How each parameter was measured, or why it was left out."""
    coverage = {}
    for name, parameter in problem.twin.named_parameters():
        owner = problem.twin.get_submodule(name.rpartition(".")[0])
        if not parameter.requires_grad:
            coverage[name] = "left out: frozen"
        elif name not in measured:
            coverage[name] = "left out: the measured outputs do not depend on it"
        else:
            coverage[name] = f"backpack: {type(owner).__name__}"
    return coverage
