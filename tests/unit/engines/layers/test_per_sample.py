"""Per-sample gradients by vmap where torch's vmap gives another shape."""

from __future__ import annotations

import torch
from torch import nn

import fimprobe


class Scaled(nn.Module):
    """A parameter of the root module, whose gradient passes a PReLU with one parameter."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.scale, self.activation = nn.Parameter(torch.ones(8)), activation
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(x) * self.scale))


class WrittenPReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, self.weight * x)


def test_a_parameter_before_prelu_is_that_before_a_written_one() -> None:
    traces = []
    for activation in (nn.PReLU(), WrittenPReLU()):
        torch.manual_seed(0)
        model = Scaled(activation).double()
        x = torch.randn(3, 6, dtype=torch.float64)
        report = fimprobe.measure(model, x, likelihood="categorical", draws=2, second_order="off")
        traces.append({n: group.i1.trace for n, group in report.parameters.items()})
    torch.testing.assert_close(traces[0], traces[1], rtol=1e-10, atol=0)
