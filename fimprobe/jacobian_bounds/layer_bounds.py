"""Bounds on a layer's Jacobian from the norms of the weights between it and the outputs."""

from __future__ import annotations

from typing import Any

import torch

from fimprobe.engines.problem.problem import MemoryLimitExceeded, Problem
from fimprobe.engines.problem.saved_tensors import limit_saved_bytes
from fimprobe.jacobian_bounds.graph import AutogradGraph
from fimprobe.jacobian_bounds.layer_bound import LayerBound, concatenate_bounds
from fimprobe.jacobian_bounds.operator_norms import OperatorNorms
from fimprobe.jacobian_bounds.propagation import BoundPropagation
from fimprobe.model.batch import Batch

__all__ = ["LayerBound", "bound_layer_jacobians"]


def bound_layer_jacobians(problem: Problem, batch: Batch) -> dict[str, LayerBound]:
    """Bounds of every module that owns a trained weight which the outputs depend on.

    From the outputs towards the input, ∂h_L/∂z_l = A_1 ⋯ A_k with z_l the layer's output before its
    activation. With s_i ≥ s_max(A_i), S = Π s_i, f_i = ‖A_i‖_F of the weights' operators, n the
    least dimension on the way (and of W_l), X̃_l the rows that meet W_l (h̄_lᵀ for a Linear):

    - ``spectral``: S s_max(X̃_l);
    - ``frobenius``: the least of √n S s_max(X̃_l), min_j (f_j/s_j) S s_max(X̃_l) and S ‖X̃_l ⊗ I‖_F.

    s_i is a Lipschitz constant for an activation; for LayerNorm, max pooling and a function written
    out in elementwise steps it is the norm of their derivative at this input. The chain is read off
    the autograd graph of one forward pass. A layer has bounds if one path leads from it to the
    outputs: layers inside one branch of a sum have, those before a fork have not. Source: Soen &
    Sun 2021, (19)–(21); (20) as printed fails at the last layer.

    Samples are taken in parts where the forward pass would keep more than half of ``memory_mb``.

    Returns:
        Module path -> bounds or reason, in the modules' order.

    Raises:
        BatchError: where the outputs are not finite.
    """
    norms: dict[tuple[Any, ...], OperatorNorms] = {}
    parts: list[dict[str, LayerBound]] = []
    start, step = 0, batch.size
    while start < batch.size:
        part = batch if step >= batch.size else batch[slice(start, start + step)]
        try:
            with torch.enable_grad(), limit_saved_bytes(problem, part.size):
                outputs = problem.forward(part)
        except MemoryLimitExceeded as over:
            step = over.fit
            continue
        if outputs.grad_fn is None:
            return {}
        with torch.enable_grad():
            parts.append(
                BoundPropagation(AutogradGraph(problem.twin, outputs, part.size, norms)).result()
            )
        start += part.size
    return {
        path: concatenate_bounds([p[path] for p in parts if path in p])
        for part in parts
        for path in part
    }
