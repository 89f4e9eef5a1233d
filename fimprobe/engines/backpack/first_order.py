"""Moments of every trainable parameter, chunk by chunk, all draws of a chunk in one backward."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from fimprobe.engines.backpack.derivatives import trainable_modules
from fimprobe.engines.backpack.first_order_rules import ChunkContext, MomentsExtension, ParameterSums
from fimprobe.engines.backpack.hooks import extended
from fimprobe.engines.backpack.sum_checks import check_copies, check_total
from fimprobe.engines.problem.cotangents import check_num_passes, label_cotangents, seen_mass
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.weights import Weights
from fimprobe.errors import FimprobeError
from fimprobe.statistics import MomentsBatch


def moments_in_domain(problem: Problem) -> MomentsBatch:
    """The moments of a problem inside the domain.

    The chunk's samples are repeated S times along the batch. Σ g of every parameter is compared
    with its gradient by plain autograd.

    Raises:
        FimprobeError: where the comparison fails, or one sample takes more than ``memory_mb``.
    """
    size = problem.batch.size
    draws, chunk = _draws_and_chunk(problem)
    sums: dict[str, ParameterSums] = {}
    exact: list[Weights] = []
    inverse: list[Tensor] = []
    seen: list[Tensor] = []
    for start in range(0, size, chunk):
        rows = slice(start, min(start + chunk, size))
        job = ChunkContext(rows, size, draws, problem.diagonals, problem.memory_mb * 2**17)
        for name, found in _chunk_sums(problem, job).items():
            sums[name] = sums[name] + found if name in sums else found
        if job.weights is not None and job.weights.second is None:
            inverse.append(job.weights.fourth)
        elif job.weights is not None:
            exact.append(job.weights)
        if job.seen is not None:
            seen.append(job.seen)
    mass = torch.stack(seen).sum(0).tolist() if seen else None
    return MomentsBatch(
        parameters={n: sums[n].finish(p) for n, p in problem.parameters.items() if n in sums},
        batch_size=size,
        draws=problem.draws.count,
        second=torch.cat([w.second for w in exact if w.second is not None]).cpu() if exact else None,
        fourth=torch.cat([w.fourth for w in exact]).cpu() if exact else None,
        blocks=torch.tensor(exact[0].blocks) if exact else None,
        inverse_weights=torch.cat(inverse).cpu() if inverse else None,
        seen_mass=seen_mass(problem, mass),
        fisher_trace=None if mass is None else mass[1],
        coverage=_coverage(problem, set(sums)),
    )


def _chunk_sums(problem: Problem, job: ChunkContext) -> dict[str, ParameterSums]:
    """Sums of the parameters that the chunk's outputs depend on; sets ``job.weights``."""
    copies = problem.batch[torch.arange(job.rows.start, job.rows.stop).repeat(job.draws)]
    layers = [module for _, module in trainable_modules(problem.twin)]
    parameters = problem.parameters
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    with extended(layers, MomentsExtension(job)), torch.enable_grad():
        h = problem.forward(copies)
        seeds = label_cotangents(problem, job.rows, h.detach()[: job.samples])
        job.weights, job.seen = seeds.weights, seeds.seen
        check_copies(h.detach(), job.samples)
        if h.requires_grad:
            gradients = torch.autograd.grad(
                h, list(parameters.values()), torch.cat(seeds.seeds), allow_unused=True
            )
    found = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is not None:
            check_total(name, job.found.get(id(parameter)), gradient, copies.size)
            found[name] = job.found[id(parameter)]
    return found


def _draws_and_chunk(problem: Problem) -> tuple[int, int]:
    """Backward passes per sample, and how many samples fit under the memory ceiling at once."""
    h, saved = _one_forward(problem)
    draws = problem.draws.count
    if draws is None:
        check_num_passes(problem, h, 0.0, math.inf)  # memory is looked at below
        draws = problem.likelihood.count_passes(h)
    each = 3 * draws * max(saved, 1)  # saved tensors, their gradients, BackPACK's references
    chunk = int(problem.memory_mb * 2**20 / each)
    if chunk < 1:
        raise FimprobeError(
            f"{draws} draws of one sample take about {each / 2**20:.2g} MB in engine='backpack', "
            f"more than memory_mb={problem.memory_mb:.4g}; pass engine='autograd', fewer draws or a "
            "larger memory_mb"
        )
    return draws, min(chunk, problem.batch.size)


def _one_forward(problem: Problem) -> tuple[Tensor, int]:
    """One sample's outputs, and the bytes that autograd saves for it beside the parameters."""
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
    told = {}
    for name, parameter in problem.twin.named_parameters():
        owner = problem.twin.get_submodule(name.rpartition(".")[0])
        if not parameter.requires_grad:
            told[name] = "left out: frozen"
        elif name not in measured:
            told[name] = "left out: the outputs do not depend on it"
        else:
            told[name] = f"backpack: {type(owner).__name__}"
    return told
