"""Per-sample weight gradients of convolutions against autograd, by every way of computing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.layers import convolutions
from fimprobe.engines.layers.convolutions import conv_weight
from fimprobe.engines.layers.layer_call import LayerCall

LAYERS = {
    "few taps": lambda: (nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6)),
    "many taps": lambda: (nn.Conv2d(8, 6, 3, stride=2, padding=1), (8, 7, 6)),
    "many taps and channels": lambda: (nn.Conv2d(8, 100, 3, dilation=2), (8, 7, 6)),
    "one dimension": lambda: (nn.Conv1d(8, 64, 7, padding="same"), (8, 11)),
    "three dimensions": lambda: (nn.Conv3d(4, 32, 3, padding=(1, 0, 1)), (4, 4, 5, 3)),
    "circular": lambda: (nn.Conv2d(8, 64, 3, padding=1, padding_mode="circular"), (8, 5, 6)),
    "grouped": lambda: (nn.Conv2d(8, 64, 5, groups=2, padding=2), (8, 5, 6)),
    "depthwise": lambda: (nn.Conv2d(8, 8, 3, groups=8), (8, 5, 6)),
    "transposed": lambda: (nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), (8, 3, 4)),
}


@pytest.mark.parametrize("draws", [1, 2, 10])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("one_sample_at_once", [False, True])
def test_gradients_of_all_draws_are_those_of_autograd(
    name: str, draws: int, one_sample_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_sample_at_once:
        monkeypatch.setitem(convolutions.MAX_PATCH_BYTES, "cpu", 1)
    torch.manual_seed(0)
    module, shape = LAYERS[name]()
    module = module.double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    delta = torch.randn(3, draws, *module(x).shape[1:], dtype=torch.float64)
    with torch.no_grad():
        g = conv_weight(LayerCall(module, (x,), False), delta)
    for i in range(3):
        for s in range(draws):
            output = module(x[i : i + 1])
            (expected,) = torch.autograd.grad(output, module.weight, delta[i : i + 1, s])
            torch.testing.assert_close(g[i, s], expected, rtol=1e-12, atol=1e-12)


class OverOneStep(nn.Module):
    """A convolution whose input is transposed and has one position."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.first, self.convolution = nn.Linear(6, 8), convolution
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.convolution(torch.tanh(self.first(x)).transpose(1, 2)))
        return self.last(x.transpose(1, 2).mean(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose1d(8, 8, 2),
        lambda: nn.Conv1d(8, 8, 9, padding=4),
        lambda: nn.Conv1d(8, 8, 3, padding=1, groups=2),
    ],
)
def test_one_transposed_position_is_measured(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = OverOneStep(make()).double(), torch.randn(2, 1, 6, dtype=torch.float64)
    options = {
        "likelihood": "categorical",
        "draws": "exact",
        "second_order": "off",
        "diagonals": True,
    }
    found = fimprobe.measure(model, x, **options).parameters["convolution.weight"].i1.diagonal
    expected = torch.zeros_like(model.convolution.weight)
    for row in x:
        p = torch.softmax(model(row[None])[0], -1)
        for y in range(3):
            (g,) = torch.autograd.grad(p.log()[y], model.convolution.weight, retain_graph=True)
            expected += p[y].detach() * g.square() / len(x)
    torch.testing.assert_close(found["convolution.weight"], expected, rtol=1e-10, atol=1e-12)


def test_many_draws_multiply_patches_on_a_cpu() -> None:
    module = nn.Conv2d(16, 64, 3)
    few, many = torch.zeros(2, 1, 1, 64, 4, 4), torch.zeros(2, 2, 1, 64, 4, 4)
    assert not convolutions._prefers_patches(module, few)
    assert convolutions._prefers_patches(module, many)
    assert not convolutions._prefers_patches(module, many.to("meta"))
