"""Exact per-sample diagonals of second derivatives and of the Fisher information, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.backpack.derivatives import derivatives_of
from fimprobe.engines.backpack.hooks import extended
from fimprobe.engines.backpack.second_order_rules import (
    LinearLoss,
    block_rows,
    ggn_extension,
    hessian_extension,
)
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch

Start = Callable[[slice, Tensor], tuple[Tensor, Tensor | None]]
"""From a chunk's rows and outputs h: the gradient at the outputs, and factors of the curvature."""


def hessian_in_domain(problem: Problem, batch: Batch, seed: Tensor) -> dict[str, Tensor]:
    """Diagonals of R = Σ_a seed_a ∂²h_a/∂θ∂θᵀ of a problem inside the domain.

    ``BatchDiagHessian`` with a loss that is not curved itself: everything comes from the residuals
    of the layers. Memory grows with the widths of all curved layers.

    Raises:
        FimprobeError: a seed of another shape, or one sample takes more than ``memory_mb``.
    """

    def start(rows: slice, h: Tensor) -> tuple[Tensor, None]:
        if seed.shape != (batch.size, *h.shape[1:]):
            raise FimprobeError(
                f"seed has shape {tuple(seed.shape)}, but the outputs have shape "
                f"{(batch.size, *h.shape[1:])}; pass one number for each output"
            )
        return seed[rows].to(h), None

    return _diagonals(problem, batch, start, curved=True)


def ggn_in_domain(problem: Problem, batch: Batch, mask: Tensor | None) -> dict[str, Tensor]:
    """Diagonals of F(x) = Jᵀ I(h) J of a problem inside the domain.

    ``BatchDiagGGNExact`` with a loss whose factor is a square root of I(h).

    Raises:
        FimprobeError: a likelihood without ``output_fisher``, or too little ``memory_mb``.
    """

    def start(rows: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        where = None if mask is None else mask[rows]
        return torch.ones_like(h), _fisher_factors(problem.likelihood, h.detach(), where)

    return _diagonals(problem, batch, start, curved=False)


def _diagonals(problem: Problem, batch: Batch, start: Start, *, curved: bool) -> dict[str, Tensor]:
    """[B, *shape] of every parameter; ``curved``: with the modules' own curvature."""
    modules = [m for m in problem.twin.modules() if not list(m.children())]
    parameters = problem.parameters
    found: dict[str, list[Tensor]] = {}
    chunk = _chunk(problem, batch, modules, curved=curved)
    for first in range(0, batch.size, chunk):
        rows = slice(first, min(first + chunk, batch.size))
        extension = hessian_extension() if curved else ggn_extension()
        loss = LinearLoss()
        with extended([*modules, loss], extension), torch.enable_grad():
            h = problem.forward(batch[rows])
            # BackPACK's pooling builds its kernels in the default dtype
            torch.set_default_dtype(h.dtype)
            loss.seed, loss.factors = start(rows, h)
            if h.requires_grad:
                torch.autograd.grad(loss(h), list(parameters.values()), allow_unused=True)
            for name, p in parameters.items():
                value = getattr(p, extension.savefield, None)
                if value is not None:
                    found.setdefault(name, []).append(value.detach())
    return {
        n: torch.cat(found[n]) if n in found else p.new_zeros(batch.size, *p.shape)
        for n, p in parameters.items()
    }


def _chunk(problem: Problem, batch: Batch, modules: list[nn.Module], *, curved: bool) -> int:
    """Samples whose factors [V, n, width] fit the ceiling.

    V is the number of outputs, or for the Hessian twice the widths of the curved modules.
    """
    widths: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        widths.append((module, max(inputs[0].numel(), output.numel())))

    handles = [m.register_forward_hook(note) for m in modules]
    try:
        with torch.no_grad():
            h = problem.forward(batch[:1])
    finally:
        for handle in handles:
            handle.remove()
    factors = h.numel()
    if curved:
        factors = 2 * sum(w for m, w in widths if not derivatives_of(m).hessian_is_zero(m))
    each = 3 * factors * max((w for _, w in widths), default=1) * h.element_size()
    ceiling = problem.memory_mb * 2**20
    if each > ceiling:
        raise FimprobeError(
            f"exact second derivatives take about {each / 2**20:.2g} MB for one sample, more than "
            f"memory_mb={problem.memory_mb:.4g}; pass second_order={{'probes': 2}}, or a larger "
            "memory_mb"
        )
    return max(1, min(batch.size, int(ceiling / max(1, each))))


def _fisher_factors(likelihood: Any, h: Tensor, mask: Tensor | None) -> Tensor:
    """Rows s_v [V, B, ...] with Σ_v s_v s_vᵀ = I(h), labels of several positions independent."""
    if not hasattr(likelihood, "output_fisher") or h.dim() < 2:
        raise FimprobeError(
            f"likelihood={likelihood.name!r} on outputs of shape {tuple(h.shape)} has no "
            "output_fisher(h) [B, ..., C, C]; pass a likelihood that has, and outputs [B, ..., C]"
        )
    axis = getattr(likelihood, "class_dim", -1)
    last = h.movedim(axis, -1)
    samples, classes = last.shape[0], last.shape[-1]
    fisher = likelihood.output_fisher(h).double().reshape(samples, -1, classes, classes)
    if mask is not None:
        keep = mask if mask.dim() < h.dim() else mask.movedim(axis, -1)
        if keep.dim() < h.dim():
            fisher = fisher * keep.reshape(samples, -1, 1, 1)
        else:  # one label per component
            keep = keep.reshape(samples, -1, classes)
            fisher = fisher * keep.unsqueeze(-1) * keep.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # [B, positions, C, C]
    rows = block_rows(root).reshape(-1, *last.shape).to(h.dtype)
    return rows.movedim(-1, axis if axis < 0 else axis + 1)
