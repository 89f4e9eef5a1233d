"""From what a peer leaves behind to a diagonal by parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rows import Contender, Diagonal
from torch import Tensor, nn


def contender(
    run: Callable[[], Any],
    read: Callable[[Any], Diagonal],
    forget: Callable[[], Any] = lambda: None,
) -> Contender:
    return Contender(run, lambda: read(run()), forget)


def by_parameter(model: nn.Module, read: Callable[[str, nn.Module], dict[str, Tensor]]) -> Diagonal:
    """What a peer keeps by module, by parameter; what tied modules hold is summed."""
    names = {id(p): n for n, p in model.named_parameters()}
    found: Diagonal = {}
    for path, module in model.named_modules():
        for local, value in read(path, module).items():
            name = names[id(module._parameters[local])]
            found[name] = found.get(name, 0) + value.reshape(module._parameters[local].shape)
    return found


def by_order(model: nn.Module, flat: Tensor) -> Diagonal:
    """A flat vector in the order of ``parameters()``."""
    parameters = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in parameters.values()])
    return {n: d.view(p.shape) for (n, p), d in zip(parameters.items(), parts, strict=True)}


class ClassesSecond(nn.Module):
    """[B, C] as it is, [B, T, C] as [B, C, T]: torch's cross-entropy takes the classes there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)
