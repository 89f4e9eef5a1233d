"""Moments of gradients of any size: what leaves float32's range is rescaled, chunk by chunk.

With Gaussian labels y = h + σz the score is z/σ: the same seed's moments scale with powers of σ, and
a float64 model at σ = 1 says what they are.
"""

import copy

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import Gaussian

pytestmark = pytest.mark.usefixtures("raw_numbers")


class Sequence(nn.Module):
    """A lookup, LayerNorm, Linear at every position, PReLU, a head tied to nothing."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.wide, self.kink, self.head = nn.Linear(6, 9), nn.PReLU(9), nn.Linear(9, 3)

    def forward(self, tokens):
        x = self.wide(self.norm(self.words(tokens))).transpose(1, 2)
        return self.head(self.kink(x).transpose(1, 2)).mean(1)


MODELS = {
    "multilayer perceptron": lambda: (
        nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 3)),
        torch.randn(6, 5),
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
        ),
        torch.randn(6, 3, 8, 8),
    ),
    "sequence": lambda: (Sequence(), torch.randint(11, (6, 7))),
}


def measured(net, x, sigma, draws, plan=None):
    return fimprobe.measure(
        net, x, likelihood=Gaussian(sigma=sigma), draws=draws, estimators=["i1"], bounds=False,
        diagonals=True, plan=plan,
    )  # fmt: skip


@pytest.mark.parametrize("sigma", [1e-11, 1e-4, 1e4, 1e11])
@pytest.mark.parametrize("draws", [1, 2, "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_moments_survive_any_scale(name, draws, sigma):
    torch.manual_seed(0)
    net, x = MODELS[name]()
    wide = copy.deepcopy(net).double()
    want = measured(wide, x if x.dtype == torch.int64 else x.double(), 1.0, draws)
    have = measured(net, x, sigma, draws)
    for group, its in {**want.parameters, "total": want.total}.items():
        mine = (have.total if group == "total" else have.parameters[group]).i1
        assert mine.trace == pytest.approx(its.i1.trace / sigma**2, rel=1e-4), group
        assert mine.norm == pytest.approx(its.i1.norm / sigma**2, rel=1e-4), group
        for field in ("label_variance", "input_variance", "total_label_variance"):
            value = getattr(its.i1, field)
            if value is None:
                assert getattr(mine, field) is None
                continue
            size = max(abs(value), 1e-3 * its.i1.norm**2)  # differences of nearly equal sums
            assert abs(getattr(mine, field) * sigma**4 - value) <= 1e-3 * size, (group, field)


def test_who_needed_it_is_noted_and_gets_it_at_once_the_next_time():
    torch.manual_seed(0)
    net, x = MODELS["multilayer perceptron"]()
    plan = Plan()
    first = measured(net, x, 1e8, 2, plan)
    assert "0.weight" in plan.rescaled
    again = measured(net, x, 1e8, 2, plan)
    assert again.total.i1.label_variance == pytest.approx(first.total.i1.label_variance, rel=1e-12)
    usual = Plan()
    measured(net, x, 1.0, 2, usual)
    assert not usual.rescaled
