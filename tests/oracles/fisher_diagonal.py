"""The diagonal of F over inputs by enumeration, one sample and one label at a time, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def input_diagonals(model: nn.Module, inputs: Tensor) -> Tensor:
    """F_ii of every input of a classifier [B, P]: Σ_y p(y|x) (∂ log p(y|x)/∂θ_i)²."""
    model = copy.deepcopy(model).double().eval()
    parameters = list(model.parameters())
    rows = []
    for x in inputs.double():
        log_p = model(x[None]).log_softmax(-1)[0]
        row = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for label in log_p:
            gradients = torch.autograd.grad(label, parameters, retain_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradients])
            row += float(label.detach().exp()) * flat.square()
        rows.append(row)
    return torch.stack(rows)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Tensors by parameter as one vector."""
    return torch.cat([x.reshape(-1).double() for x in tensors.values()])
