"""Second-order BackPACK extensions for all modules of the domain, from any curvature at the outputs.

A second derivative of the outputs is a sum over the modules that bend: each one has a residual H at
its input, and the modules before it are linear there. Factors W [V, N, *] hold what their Jacobians
make of the V unit vectors at that input, so that H pulled back is W H Wᵀ. With n cotangents there are
n residuals, and W serves all of them. Factors keep the module that they come from: those of one
module that arrive by two ways, as behind a residual connection, are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from backpack.extensions import BatchDiagGGNExact, BatchDiagHessian
from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
from torch import Tensor, nn

from fimprobe.engines.backpack.derivatives import LAYERS, PLAIN
from fimprobe.engines.backpack.module_graph import ModuleGraph
from fimprobe.engines.backpack.normalisation import NormDerivatives

MAX_STACK_ELEMENTS = 2**22
"""Entries of a stack of per-sample gradients that is formed at once: 16 MB in float32."""


class LinearLoss(nn.modules.loss._Loss):
    """Σ v∘h: a loss with the gradient v at the outputs, and without curvature of its own."""

    def __init__(self) -> None:
        super().__init__(reduction="sum")
        self.cotangents = torch.zeros(())

    def forward(self, h: Tensor) -> Tensor:
        """The sum of the outputs times their cotangents."""
        return (self.cotangents * h).sum()


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """n residuals H at the input of one module: diagonal, or with blocks of D entries.

    Attributes:
        diagonal: The diagonals [n, V, N]; None for blocks.
        blocks: The blocks [n, N, K, D, D] with K·D = V; None for diagonals.
    """

    diagonal: Tensor | None = None
    blocks: Tensor | None = None

    def quadratic(self, factors: Tensor) -> Tensor:
        """The diagonals of W H Wᵀ for each of the n residuals.

        Args:
            factors: W [V, N, *].

        Returns:
            Their entries [n, N, *].
        """
        if self.diagonal is not None:
            return torch.einsum("nvb,vb...->nb...", self.diagonal, factors.square())
        assert self.blocks is not None
        blocks = factors.reshape(*self.blocks.shape[2:4], *factors.shape[1:])
        moved = torch.einsum("nbkde,keb...->nkdb...", self.blocks, blocks)
        return (blocks * moved).sum((1, 2))

    def split(self, step: int) -> Iterator[tuple[slice, Residuals]]:
        """Split into residuals of at most ``step`` unit vectors, but of whole blocks."""
        if self.diagonal is not None:
            for start in range(0, self.diagonal.shape[1], step):
                rows = slice(start, start + step)
                yield rows, Residuals(diagonal=self.diagonal[:, rows])
            return
        assert self.blocks is not None
        count, size = self.blocks.shape[2:4]
        step = max(1, step // size)
        for start in range(0, count, step):
            rows = slice(start * size, (start + step) * size)
            yield rows, Residuals(blocks=self.blocks[:, :, start : start + step])


@dataclass(frozen=True, kw_only=True)
class ParameterDiagonals:
    """Diagonals of one parameter for n cotangents and N samples.

    Attributes:
        values: The entries [n, N, *shape]; for outer products [n, N, rows].
        columns: Factors of the columns of an outer product [N, columns]; None for entries.
    """

    values: Tensor
    columns: Tensor | None = None

    def entries(self) -> Tensor:
        """All entries [n, N, *shape]."""
        if self.columns is None:
            return self.values
        return torch.einsum("nbo,bi->nboi", self.values, self.columns)

    def sums(self) -> tuple[Tensor, Tensor]:
        """The sums of the entries and of their squares [n, N], in float64."""
        values = self.values.double().flatten(2)
        trace, square = values.sum(-1), values.square().sum(-1)
        if self.columns is not None:
            columns = self.columns.double()
            trace, square = trace * columns.sum(-1), square * columns.square().sum(-1)
        return trace, square


def concatenate(chunks: Sequence[ParameterDiagonals]) -> ParameterDiagonals:
    """Return the diagonals of all samples from those of successive chunks."""
    columns = [chunk.columns for chunk in chunks if chunk.columns is not None]
    return ParameterDiagonals(
        values=torch.cat([chunk.values for chunk in chunks], 1).detach(),
        columns=torch.cat(columns) if columns else None,
    )


Factors = dict[Any, tuple[Tensor, Residuals]]
"""W and H by where they come from: a module that bends, or None for the outputs."""


@dataclass(kw_only=True)
class Flow:
    """What an extension hands from module to module in one backward pass.

    Attributes:
        graph: The sources of each module's input.
        samples: The first N rows of the batch, whose copies the others are.
        curved: Whether the residuals of modules count.
        at_outputs: Factors of the curvature at the outputs.
        arrived: Factors at the output of each module.
    """

    graph: ModuleGraph
    samples: int
    curved: bool
    at_outputs: Factors = field(default_factory=dict)
    arrived: dict[nn.Module, Factors] = field(default_factory=dict)

    def send(self, module: nn.Module, factors: Factors) -> None:
        """Add the factors at a module's input to those at the outputs that it sums."""
        for source in self.graph.sources[module] or ():
            there = self.arrived.setdefault(source, {})
            for origin, (matrix, residuals) in factors.items():
                if origin in there:
                    matrix = matrix + there[origin][0]
                there[origin] = (matrix, residuals)


def second_order_extension(flow: Flow) -> Any:
    """``BatchDiagHessian``, or ``BatchDiagGGNExact`` without curvature, with the rules of the domain.

    It saves :class:`ParameterDiagonals` to the ``savefield`` of each parameter.

    Args:
        flow: Receives and hands on the factors.
    """
    extension = BatchDiagHessian() if flow.curved else BatchDiagGGNExact()
    extension.flow = flow
    for kind, (derivatives, params) in LAYERS.items():
        extension.set_module_extension(kind, _Rule(derivatives, params), overwrite=True)
    for kind, derivatives in PLAIN.items():
        extension.set_module_extension(kind, _Rule(derivatives), overwrite=True)
    extension.set_module_extension(LinearLoss, _send_at_outputs)
    return extension


def _send_at_outputs(ext: Any, module: Any, g_inp: Any, g_out: Any) -> None:
    """Begin with the curvature at the outputs."""
    ext.flow.send(module, ext.flow.at_outputs)


class _Rule(MatToJacMat):
    """Diagonals of the parameters of a module, which is linear in them, and factors at its input."""

    def __init__(self, derivatives: Any, params: tuple[str, ...] = ()) -> None:
        for name in params:
            setattr(self, name, partial(self._diagonal, name))
        super().__init__(derivatives, params=list(params))
        self._names = params

    def __call__(self, ext: Any, module: Any, g_inp: Any, g_out: Any) -> None:
        """Process a module in the backward pass."""
        flow: Flow = ext.flow
        copies = module.input0.shape[0]
        # the other rows are copies, whose Jacobians are the same
        module.input0, module.output = module.input0[: flow.samples], module.output[: flow.samples]
        factors = flow.arrived.pop(module, {})
        for name in self._names:
            parameter = getattr(module, name)
            if factors and parameter is not None and parameter.requires_grad:
                setattr(parameter, ext.savefield, self._diagonal(name, module, factors))
        if not module.input0.requires_grad:
            return
        factors = {
            origin: (self.derivatives.jac_t_mat_prod(module, g_inp, g_out, matrix), residuals)
            for origin, (matrix, residuals) in factors.items()
        }
        if flow.curved and not self.derivatives.hessian_is_zero(module):
            delta = g_out[0].detach().unflatten(0, (copies // flow.samples, flow.samples))
            factors[module] = _bend(self.derivatives, module, delta)
        flow.send(module, factors)

    def _diagonal(self, name: str, module: Any, factors: Factors) -> ParameterDiagonals:
        """What the factors show of one parameter."""
        x: Tensor = module.input0.detach()
        if name == "weight" and isinstance(module, nn.Linear) and x.dim() == 2:
            # a gradient is an outer product with the input, whose square comes out of the sum
            squares = [residuals.quadratic(matrix) for matrix, residuals in factors.values()]
            return ParameterDiagonals(values=torch.stack(squares).sum(0), columns=x.square())
        numel = len(x) * getattr(module, name).numel()
        step = max(1, MAX_STACK_ELEMENTS // max(1, numel))
        total: Any = 0
        for matrix, residuals in factors.values():
            for rows, part in residuals.split(step):
                product = self.derivatives.param_mjp(
                    name, module, None, None, matrix[rows], sum_batch=False
                )
                total = total + part.quadratic(product)
        return ParameterDiagonals(values=total)


def _bend(derivatives: Any, module: Any, delta: Tensor) -> tuple[Tensor, Residuals]:
    """W and H at the input of a module that bends.

    Args:
        derivatives: Those of the module.
        module: The module, with its inputs [N, *].
        delta: The n cotangents at its output [n, N, *].
    """
    x = module.input0.detach()
    width = x[0].numel()
    unit = torch.eye(width, dtype=x.dtype, device=x.device)
    matrix = unit[:, None].expand(width, len(x), width).reshape(width, *x.shape)
    if isinstance(derivatives, NormDerivatives):
        return matrix, Residuals(blocks=derivatives.residual(module, delta))
    curvature = (derivatives.d2f(module, None, None) * delta).flatten(2)
    return matrix, Residuals(diagonal=curvature.transpose(1, 2))


def block_rows(root: Tensor) -> Tensor:
    """Columns of the roots [N, K, D, D] of K blocks as rows [K·D, N, K, D], zero in other blocks.

    If r rᵀ is the curvature of a block, Σ_v s_v s_vᵀ over the rows is that of all blocks together.
    """
    samples, count, size = root.shape[:3]
    rows = root.new_zeros(count, size, samples, count, size)
    block = torch.arange(count, device=root.device)
    rows[block, :, :, block] = root.permute(1, 3, 0, 2)
    return rows.flatten(0, 1)
