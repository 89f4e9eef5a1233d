"""Diagonals as common code computes them, from the gradients of single inputs and labels in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


class LabelGradients:
    """Gradients of −log p(y|x) for every label and input of a classifier [C, N, P].

    Args:
        model: The classifier.
        x: Inputs.
        y: Labels of the data.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(model).double().eval(), x.double(), y
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        self.p = self.model(self.x).detach().softmax(1)
        classes = self.p.shape[1]
        self.all = torch.stack([self._of(torch.full_like(y, c)) for c in range(classes)])
        self.rows = torch.arange(len(x))

    def _of(self, labels: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(self.model, parameters, (x[None],))
            return nn.functional.cross_entropy(output, y[None])

        gradients = vmap(grad(loss), (None, 0, 0))(self.parameters, self.x, labels)
        return torch.cat([g.reshape(len(self.x), -1) for g in gradients.values()], 1)

    def at(self, labels: Tensor) -> Tensor:
        """The gradient of each input with its label [N, P]."""
        return self.all[labels, self.rows]

    @property
    def unsigned(self) -> Tensor:
        """Σ_y √p_y times the gradient of y, for each input [N, P]."""
        return torch.einsum("nc,cnp->np", self.p.sqrt(), self.all)

    @property
    def fisher(self) -> Tensor:
        """The diagonal of F [P]."""
        return torch.einsum("nc,cnp->p", self.p, self.all.square()) / len(self.x)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector as tensors by parameter."""
        parts = vector.split([p.numel() for p in self.parameters.values()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        return {n: part.view(p.shape) for (n, p), part in pairs}


def batch_means_squared(gradients: Tensor, size: int, order: Tensor | None = None) -> Tensor:
    """The squared mean gradient of each batch [batches, P]."""
    ordered = gradients if order is None else gradients[order]
    return torch.stack([part.mean(0).square() for part in ordered.split(size)])
