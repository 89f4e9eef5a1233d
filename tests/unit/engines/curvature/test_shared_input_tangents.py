"""How inputs move along a direction of the parameters does not depend on the outputs' vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.curvature import norm_accumulator
from fimprobe.engines.curvature.double_backward import DoubleBackward
from fimprobe.engines.curvature.norm_accumulator import NormAccumulator


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class Reused(nn.Module):
    """One layer twice, whose uses interact."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Scaled(nn.Module):
    """A parameter without a rule, which is evaluated again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sin(x * self.scale))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


MODELS = {
    "tanh": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 3)),
        torch.randn(3, 4),
    ),
    "piecewise linear": lambda: (convolutional(), torch.randn(3, 1, 6, 6)),
    "attention": lambda: (Attention(), torch.randn(3, 5, 4)),
    "reused": lambda: (Reused(), torch.randn(3, 4)),
    "without a rule": lambda: (nn.Sequential(nn.Linear(4, 4), Scaled()), torch.randn(3, 4)),
}


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_input_tangents_are_those_of_every_vector(name, draws, double, monkeypatch):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    compared = []
    all_edge_tangents = DoubleBackward.all_edge_tangents

    def compare(self, directions, moves=None, *, inputs=True, piecewise_linear=False):
        found = all_edge_tangents(
            self, directions, moves, inputs=inputs, piecewise_linear=piecewise_linear
        )
        for y, tangents in enumerate(found):
            alone = self.edge_tangents(
                y, directions, moves, inputs=inputs, piecewise_linear=piecewise_linear
            )
            for shared, own in zip(tangents.inputs, alone.inputs, strict=True):
                assert (shared is None) == (own is None)
                if own is not None:
                    torch.testing.assert_close(shared, own, rtol=1e-12, atol=1e-12)
                    compared.append(y)
        return found

    monkeypatch.setattr(DoubleBackward, "all_edge_tangents", compare)
    fimprobe.measure(model, x, likelihood="categorical", draws=draws, second_order={"probes": 2})
    assert max(compared) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_tangents_of_one_vector_and_sample_at_once_give_the_same(name, double, monkeypatch):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    products, compared = NormAccumulator._per_sample_products, []

    def compare(self, derivatives, plain, flipped):
        found = products(self, derivatives, plain, flipped)
        with monkeypatch.context() as patch:
            patch.setattr(norm_accumulator, "CPU_CACHE_BYTES", 1)
            patch.setattr(self, "workspace_bytes", 1.0)
            alone = products(self, derivatives, plain, flipped)
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-14)
        compared.append(float(found.abs().sum()))
        return found

    monkeypatch.setattr(NormAccumulator, "_per_sample_products", compare)
    fimprobe.measure(model, x, likelihood="categorical", draws=2, second_order={"probes": 2})
    assert max(compared) > 0
