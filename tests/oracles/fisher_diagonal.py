"""The diagonal of F over inputs by enumeration of labels, from dense Jacobians in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


def input_diagonals(model: nn.Module, inputs: Tensor) -> Tensor:
    """F_ii of every input of a classifier [B, P]: Σ_y p(y|x) (∂ log p(y|x)/∂θ_i)²."""
    return input_moments(model, inputs)[0]


def input_moments(model: nn.Module, inputs: Tensor, part: int = 256) -> tuple[Tensor, Tensor]:
    """F_ii of every input [B, P], and Σ_i E g_i⁴ [B] of its score g with labels from the model.

    The outputs are logits [B, C], or [B, T, C] of T labels that are independent given the input.

    Args:
        model: The classifier.
        inputs: Its inputs.
        part: Number of inputs whose Jacobians are kept together.
    """
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_p(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        h = functional_call(model, parameters, (x[None],))[0]
        return h.log_softmax(-1).reshape(-1, h.shape[-1])

    diagonals, fourths = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for x in (inputs.double() if inputs.is_floating_point() else inputs).split(part):
            slopes = vmap(jacrev(log_p), (None, 0))(parameters, x)  # [B, T, Y, ...] by name
            p = vmap(log_p, (None, 0))(parameters, x).exp()
            squares = torch.cat([s.flatten(3) for s in slopes.values()], 3).square_()
            f = torch.einsum("bty,btyi->bti", p, squares)
            fourth = torch.einsum("bty,btyi->b", p, squares.square_())
            diagonals.append(f.sum(1))
            # of a sum of independent scores: only pairs of positions add to the single ones
            pairs = diagonals[-1].square().sum(1) - f.square().sum((1, 2))
            fourths.append(fourth + 3 * pairs)
    return torch.cat(diagonals), torch.cat(fourths)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Tensors by parameter as one vector."""
    return torch.cat([x.reshape(-1).double() for x in tensors.values()])


def rms(values: list[float]) -> float:
    """The root mean square."""
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())
