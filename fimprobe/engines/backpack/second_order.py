"""Exact per-sample diagonals of second derivatives and of the Fisher information, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.backpack.derivatives import derivatives_of
from fimprobe.engines.backpack.hooks import extended
from fimprobe.engines.backpack.module_graph import recorded
from fimprobe.engines.backpack.second_order_rules import (
    Flow,
    LinearLoss,
    ParameterDiagonals,
    Residuals,
    block_rows,
    concatenate,
    second_order_extension,
)
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch

OutputCurvature = Callable[[slice, Tensor], tuple[Tensor, Tensor | None]]
"""Maps a chunk's rows and outputs h to n cotangents [n, b, ...], and factors of the curvature."""

LIVE_FACTORS = 4
"""Factors of the size of the largest one that are in memory together."""


def hessian_in_domain(
    problem: Problem, batch: Batch, cotangents: Tensor
) -> dict[str, ParameterDiagonals]:
    """Diagonals of R = Σ_a v_a ∂²h_a/∂θ∂θᵀ of a problem inside the domain.

    This is ``BatchDiagHessian`` with a loss that is linear in the outputs: all curvature comes from
    the residuals of the layers. Memory grows with the widths of all layers that are not linear.

    Args:
        problem: The model.
        batch: Inputs of B samples.
        cotangents: n vectors v [n, B, ...], each of the shape of the outputs.

    Raises:
        FimprobeError: For cotangents of another shape, or if one sample needs more than
            ``memory_mb``.
    """

    def output_curvature(rows: slice, h: Tensor) -> tuple[Tensor, None]:
        """Cotangents of a chunk of b samples, without curvature at the outputs.

        Args:
            rows: Places of the b samples in the batch.
            h: Their outputs [b, ...].

        Returns:
            Their v [n, b, ...] in the type of ``h``; None for the factors.

        Raises:
            FimprobeError: If ``cotangents`` has another shape than the outputs of the batch.
        """
        expected = (batch.size, *h.shape[1:])
        if cotangents.shape[1:] != expected:
            raise FimprobeError(
                f"`cotangents` must have the shape of the outputs, {expected} for each of n vectors, "
                f"got {tuple(cotangents.shape)}. Pass one number for each vector and output."
            )
        return cotangents[:, rows].to(h), None

    return _diagonals(problem, batch, output_curvature, count=len(cotangents))


def ggn_in_domain(problem: Problem, batch: Batch, mask: Tensor | None) -> dict[str, Tensor]:
    """Diagonals [B, *shape] of F(x) = Jᵀ I(h) J of a problem inside the domain.

    This is ``BatchDiagGGNExact`` with a loss whose factor is a square root of I(h).

    Args:
        problem: The model and the likelihood.
        batch: Inputs of B samples.
        mask: Positions that count, bool [B, ...]; None for all of them.

    Raises:
        FimprobeError: For a likelihood without ``output_fisher``, or if one sample needs more than
            ``memory_mb``.
    """

    def output_curvature(rows: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of I(h) of a chunk of b samples.

        Args:
            rows: Places of the b samples in the batch.
            h: Their outputs [b, ...].

        Returns:
            Cotangents of ones, on which the result does not depend; the factors [V, b, ...].

        Raises:
            FimprobeError: For a likelihood without ``output_fisher``, or outputs without a class
                dimension.
        """
        chunk_mask = None if mask is None else mask[rows]
        factors = _fisher_factors(problem.likelihood, h.detach(), chunk_mask)
        return torch.ones_like(h)[None], factors

    diagonals = _diagonals(problem, batch, output_curvature, count=0)
    return {name: diagonal.entries()[0] for name, diagonal in diagonals.items()}


def _diagonals(
    problem: Problem, batch: Batch, output_curvature: OutputCurvature, *, count: int
) -> dict[str, ParameterDiagonals]:
    """Per-sample diagonals of every parameter.

    Args:
        problem: The model.
        batch: Inputs of B samples.
        output_curvature: The curvature at the outputs.
        count: The number n of cotangents of the Hessian, for which the residuals of the modules
            count; 0 for the GGN, which has one.
    """
    modules = [m for m in problem.twin.modules() if not list(m.children())]
    parameters, copies = problem.parameters, max(count, 1)
    diagonals: dict[str, list[ParameterDiagonals]] = {}
    step = _chunk_size(problem, batch, modules, count=count)
    for start in range(0, batch.size, step):
        rows = slice(start, min(start + step, batch.size))
        size, loss = rows.stop - rows.start, LinearLoss()
        index = torch.arange(start, rows.stop).repeat(copies)
        with recorded([*modules, loss]) as graph:
            flow = Flow(graph=graph, samples=size, curved=count > 0)
            extension = second_order_extension(flow)
            with extended([*modules, loss], extension), torch.enable_grad():
                h = problem.forward(batch[index])
                graph.check(h)
                # BackPACK's pooling builds its kernels in the default dtype
                torch.set_default_dtype(h.dtype)
                vectors, factors = output_curvature(rows, h[:size])
                loss.cotangents = vectors.flatten(0, 1)
                if factors is not None:
                    ones = factors.new_ones(1, *factors.shape[:2])
                    flow.at_outputs = {None: (factors, Residuals(diagonal=ones))}
                if h.requires_grad:
                    torch.autograd.grad(loss(h), list(parameters.values()), allow_unused=True)
                for name, p in parameters.items():
                    value = getattr(p, extension.savefield, None)
                    if value is not None:
                        diagonals.setdefault(name, []).append(value)
    return {
        name: concatenate(diagonals[name])
        if name in diagonals
        else ParameterDiagonals(values=p.new_zeros(copies, batch.size, *p.shape))
        for name, p in parameters.items()
    }


def _chunk_size(problem: Problem, batch: Batch, modules: list[nn.Module], *, count: int) -> int:
    """The number of samples whose factors [V, b, width] fit into ``memory_mb``.

    V is the number of outputs; for the Hessian, the sum of the widths of all modules that are not
    linear, and each of the ``count`` cotangents has a copy of the sample.
    """
    widths: list[tuple[nn.Module, int]] = []

    def record_width(module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Note the larger of the sizes of a module's input and output; a forward hook."""
        widths.append((module, max(inputs[0].numel(), output.numel())))

    handles = [m.register_forward_hook(record_width) for m in modules]
    try:
        h = problem.evaluate(batch[:1])
    finally:
        for handle in handles:
            handle.remove()
    factors = h.numel()
    if count:
        factors = count + sum(w for m, w in widths if not derivatives_of(m).hessian_is_zero(m))
    largest = max((w for _, w in widths), default=1)
    bytes_each = LIVE_FACTORS * factors * largest * h.element_size()
    limit_bytes = problem.memory_mb * 2**20
    if bytes_each > limit_bytes:
        raise FimprobeError(
            f"exact second derivatives take about {bytes_each / 2**20:.2g} MB for one sample, more "
            f"than memory_mb={problem.memory_mb:.4g}. Pass second_order={{'probes': 2}}, or a larger "
            "memory_mb."
        )
    return max(1, min(batch.size, int(limit_bytes / max(1, bytes_each))))


def _fisher_factors(likelihood: Any, h: Tensor, mask: Tensor | None) -> Tensor:
    """Rows s_v [V, B, ...] with Σ_v s_v s_vᵀ = I(h), where labels of positions are independent.

    Args:
        likelihood: A likelihood with ``output_fisher``.
        h: Outputs [B, ..., C].
        mask: Positions that count; None for all of them.
    """
    if not hasattr(likelihood, "output_fisher") or h.dim() < 2:
        raise FimprobeError(
            f"likelihood={likelihood.name!r} on outputs of shape {tuple(h.shape)} has no "
            "output_fisher(h) [B, ..., C, C]. Pass a likelihood with it, and outputs [B, ..., C]."
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
