"""Ways by products with whole Jacobians: curvlinops, Laplace, vmap(grad), one batch-summed backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from problems import Problem, loss_of, sample_labels
from readers import ClassesSecond, by_order, contender
from rows import Contender, Diagonal
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


def curvlinops(operator: str) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        import curvlinops as package

        model, x = problem.model, problem.x
        with torch.no_grad():
            labels = sample_labels(model(x))
        parameters, outputs = list(model.parameters()), ClassesSecond(model)

        def run() -> Tensor:
            seed = {"seed": int(torch.randint(2**31, ()))} if "MC" in operator else {}
            matrix = getattr(package, operator)(
                outputs,
                nn.CrossEntropyLoss(reduction="sum"),
                parameters,
                [(x, labels)],
                check_deterministic=False,
                **seed,
            )
            with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
                return package.hutchinson_diag(matrix, 1)

        return contender(run, lambda flat: by_order(model, flat))

    return make


def laplace(backend: str, **options: Any) -> Callable[[Problem], Contender]:
    def make(problem: Problem) -> Contender:
        import laplace.curvature as package

        model, x = problem.model, problem.x
        with torch.no_grad():
            h = model(x)
        if backend == "CurvlinopsGGN":
            size = 4 * h.numel() * problem.parameters  # dense Jacobians
            if size > 2**27:  # the CNN's 0.2 GB took 22 GB and 1,300 forward+backwards
                raise MemoryError(f"dense Jacobians of {size / 2**30:.1f} GB, several times")
        labels = sample_labels(h)
        model.output_size = h.shape[-1]
        interface = getattr(package, backend)(model, "classification", **options)
        run = functools.partial(interface.diag, x, labels, N=len(x))
        return contender(run, lambda found: by_order(model, found[1]))

    return make


def vmap_grad(problem: Problem) -> Contender:
    model, x = problem.model, problem.x

    def loss(parameters: dict[str, Tensor], one: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters, (one[None],)), y[None])

    def run() -> Diagonal:
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        with torch.no_grad():
            y = sample_labels(model(x))
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        return {n: g.square_().sum(0) for n, g in gradients.items()}

    return contender(run, lambda found: found)


def batch_summed(problem: Problem) -> Contender:
    """Sun 2026: one backward of Σ_b ⟨L_b ξ_b, h_b⟩, squared; L = diag √p − p √pᵀ, ξ signs."""
    model, x = problem.model, problem.x
    parameters = dict(model.named_parameters())

    def run() -> Diagonal:
        h = model(x)
        p = h.detach().softmax(-1)
        root = p.sqrt() * torch.randint_like(p, 2).mul_(2).sub_(1)
        seed = root - p * root.sum(-1, keepdim=True)
        found = torch.autograd.grad(h, list(parameters.values()), seed)
        return {n: g.square_() for n, g in zip(parameters, found, strict=True)}

    return contender(run, lambda found: found)
