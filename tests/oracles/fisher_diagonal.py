"""The diagonal of F over inputs by enumeration of labels, from dense Jacobians in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


def input_diagonals(model: nn.Module, inputs: Tensor) -> Tensor:
    """F_ii of every input of a classifier [B, P]: Σ_y p(y|x) (∂ log p(y|x)/∂θ_i)²."""
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_p(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).log_softmax(-1)[0]

    rows = []
    for part in inputs.double().split(256):
        slopes = vmap(jacrev(log_p), (None, 0))(parameters, part)  # [B, Y, ...] by name
        p = vmap(log_p, (None, 0))(parameters, part).exp()
        squares = torch.cat([x.flatten(2).square() for x in slopes.values()], 2)
        rows.append(torch.einsum("by,byi->bi", p, squares))
    return torch.cat(rows)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Tensors by parameter as one vector."""
    return torch.cat([x.reshape(-1).double() for x in tensors.values()])


def rms(values: list[float]) -> float:
    """The root mean square."""
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())
