"""The gradient noise scale against dense gradients, and its error against the distribution."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.estimators.noise_scale import NEAR_ZERO

SIGMA = 0.7


def regression(size, seed):
    """A linear model away from the optimum, and a sample from a known distribution."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    x = torch.cat([x, torch.ones(size, 1, dtype=torch.float64)], 1)
    y = x[:, :2] + 0.5 * torch.randn(size, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.4, 0.1, 0.2, 0.0], [0.0, 0.5, 0.0, 0.3]]))
    return model, x, y


def gradients(model, x, y):
    """Gradients of log p(y|x) of each input [B, P], by hand."""
    residual = (y - x @ model.weight.detach().T) / SIGMA**2
    return torch.einsum("bo,bi->boi", residual, x).flatten(1)


def measured(model, x, y, **options):
    family = fimprobe.likelihoods.Gaussian(sigma=SIGMA)
    return fimprobe.measure(
        model, x, likelihood=family, labels=y, estimators=("i1", "empirical"), bounds=False, **options
    )


def test_it_is_the_ratio_of_unbiased_estimates():
    model, x, y = regression(200, 0)
    g = gradients(model, x, y)
    pairs = g @ g.T
    square = float(pairs.sum() - pairs.trace()) / (200 * 199)
    trace = float(g.var(0).sum())
    estimate = measured(model, x, y).total.empirical
    assert estimate.noise_scale == pytest.approx(trace / square, rel=1e-9)
    # chunks of the batch do not change it
    small = measured(model, x, y, memory_mb=0.02).total.empirical
    assert small.noise_scale == pytest.approx(trace / square, rel=1e-9)


def test_its_error_covers_the_value_of_the_distribution():
    model, x, y = regression(200_000, 1)
    g = gradients(model, x, y)
    true = float(g.var(0).sum() / g.mean(0).square().sum())
    runs = [measured(*regression(128, seed)).total.empirical for seed in range(2, 42)]
    inside = [abs(e.noise_scale - true) <= 2 * e.noise_scale_error for e in runs]
    assert sum(inside) >= 0.85 * len(runs)
    spread = torch.tensor([e.noise_scale for e in runs]).std()
    stated = torch.tensor([e.noise_scale_error for e in runs]).square().mean().sqrt()
    assert 0.6 < float(stated / spread) < 1.7


def test_a_gradient_that_noise_hides_is_undetermined():
    model, x, y = regression(64, 3)
    with torch.no_grad():  # the optimum
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    estimate = measured(model, x, y).total.empirical
    assert estimate.noise_scale is None and estimate.noise_scale_error is None
    assert estimate.unknown["noise_scale"] == NEAR_ZERO and "two standard errors" in NEAR_ZERO


def test_every_layer_has_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(256, 4)
    y = (x[:, 0] > 0).long() + 1
    report = fimprobe.measure(
        net, x, likelihood="categorical", labels=y, estimators=("i1", "empirical")
    )
    scales = [layer.empirical.noise_scale for layer in report.layers.values()]
    assert all(scale > 0 for scale in scales) and report.total.empirical.noise_scale > 0
    assert report.to_dict()["layers"]["0"]["empirical"]["noise_scale"] == scales[0]
    assert "fim/empirical/noise_scale" in report.scalars()


def test_few_inputs_and_small_memory_have_none_with_the_reason():
    model, x, y = regression(3, 0)
    estimate = measured(model, x, y).total.empirical
    assert "at least four inputs" in estimate.unknown["noise_scale"]
