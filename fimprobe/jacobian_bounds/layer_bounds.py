"""Bounds on the Jacobian of every layer, from the norms of the weights that follow it."""

from __future__ import annotations

from typing import Any

import torch

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.saved_tensors import outputs_in_parts
from fimprobe.jacobian_bounds.graph import AutogradGraph
from fimprobe.jacobian_bounds.layer_bound import LayerBound, concatenate_bounds
from fimprobe.jacobian_bounds.operator_norms import OperatorNorms
from fimprobe.jacobian_bounds.propagation import BoundPropagation
from fimprobe.model.batch import Batch

__all__ = ["LayerBound", "bound_layer_jacobians"]


def bound_layer_jacobians(problem: Problem, batch: Batch) -> dict[str, LayerBound]:
    """Bounds of every module with a trained weight on which the outputs depend.

    From the outputs towards the input, ∂h_L/∂z_l = A_1 ⋯ A_k, z_l being the layer's output before its
    activation. With s_i ≥ s_max(A_i), S = Π s_i, f_i = ‖A_i‖_F of the weights' operators, n the
    least dimension on the path (and of W_l) and X̃_l the rows that W_l is applied to (h̄_lᵀ for a
    Linear layer):

    - ``spectral``: S s_max(X̃_l);
    - ``frobenius``: the least of √n S s_max(X̃_l), min_j (f_j/s_j) S s_max(X̃_l) and S ‖X̃_l ⊗ I‖_F.

    s_i is a Lipschitz constant for an activation. For LayerNorm, max pooling and functions written in
    elementwise steps it is the norm of their derivative at this input. The operators are read from
    the autograd graph of one forward pass. A layer has bounds if a single path leads from it to the
    outputs: layers inside one branch of a sum have bounds, those in front of a fork have none.

    If the forward pass would keep more than half of ``memory_mb``, parts of the batch are measured
    one after the other.

    Source: Soen & Sun (2021), eq. 19 to 21. Eq. 20 as printed fails at the last layer.

    Args:
        problem: The question of the measurement, with the twin.
        batch: Inputs of the forward pass.

    Returns:
        Bounds or the reason for their absence, by module path, in the order of the modules.

    Raises:
        BatchError: If the outputs are not finite.
    """
    norms: dict[tuple[Any, ...], OperatorNorms] = {}
    parts: list[dict[str, LayerBound]] = []
    for part, outputs in outputs_in_parts(problem, batch):
        if outputs.grad_fn is None:
            return {}
        with torch.enable_grad():
            graph = AutogradGraph(problem.twin, outputs, part.size, norms)
            parts.append(BoundPropagation(graph).result())
    return {
        path: concatenate_bounds([p[path] for p in parts if path in p])
        for part in parts
        for path in part
    }
