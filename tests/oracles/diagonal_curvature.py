"""V2 of every entry by dense second derivatives of all outputs, in float64, without the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


def label_variances(
    model: nn.Module,
    inputs: dict[str, Tensor] | tuple[Any, ...],
    pick: Callable = lambda o: o,
    *,
    classes: int,
) -> dict[str, Tensor]:
    """{name: [B, *shape]}: Σ_t Var_p (∂²h_t/∂θ_e²) for softmax outputs of so many classes."""
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    size = next(len(x) for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
    of_samples = []
    for b in range(size):
        one = [x[b : b + 1] if isinstance(x, Tensor) else x for x in args]
        more = {k: x[b : b + 1] for k, x in kwargs.items()}

        def outputs(values: dict[str, Tensor], one: Any = one, more: Any = more) -> Tensor:
            return pick(functional_call(model, values, tuple(one), more)).reshape(-1, classes)

        with sdpa_kernel(SDPBackend.MATH):
            p = outputs(named).softmax(-1)
            of_samples.append({n: _variance(outputs, named, n, p) for n in named})
    return {n: torch.stack([of_sample[n] for of_sample in of_samples]) for n in named}


def _variance(outputs: Callable, named: dict[str, Tensor], name: str, p: Tensor) -> Tensor:
    def of_parameter(flat: Tensor) -> Tensor:
        return outputs({**named, name: flat.view(named[name].shape)})

    second = jacfwd(jacrev(of_parameter))(named[name].flatten())  # [T, C, P, P]
    v = second.diagonal(dim1=2, dim2=3)  # [T, C, P]
    mean = (p.unsqueeze(-1) * v).sum(1)
    variance = (p.unsqueeze(-1) * v.square()).sum(1) - mean.square()
    return variance.sum(0).view(named[name].shape)
