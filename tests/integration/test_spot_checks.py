"""`second_order="spot_checks"` in whole measurements."""

import dataclasses

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.distributed.merge import merge
from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.estimators.spot_checks import estimate_v2
from fimprobe.statistics import Measured
from tests.oracles.diagonal_curvature import label_variances
from tests.support.spot_checks import spot_problem


def net():
    layers = [
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 6),
        nn.GELU(),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    ]
    return nn.Sequential(*layers).double(), torch.randn(16, 6, dtype=torch.float64)


def measure(model, x, **options):
    options = {"likelihood": "categorical", "second_order": "spot_checks", "bounds": False} | options
    return fimprobe.measure(model, x, **options)


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("bounds", [False, True])
def test_the_report_has_the_label_variance_with_its_error(draws, bounds):
    model, x = net()
    report = measure(model, x, draws=draws, bounds=bounds)
    truth = label_variances(model, (x,), classes=3)
    sums = {n: float(v.flatten(1).sum(1).mean()) for n, v in truth.items()}
    for layer in ("0", "2"):
        estimate = report.layers[layer].i2
        expected = sums[f"{layer}.weight"] + sums[f"{layer}.bias"]
        assert abs(estimate.label_variance - expected) < 4 * estimate.label_variance_error
    total = report.total.i2
    assert abs(total.label_variance - sum(sums.values())) < 4 * total.label_variance_error
    assert total.probe_error is None
    assert (total.total_label_variance is None) is not bounds
    for layer in ("4", "5"):
        estimate = report.layers[layer].i2
        assert (estimate.label_variance, estimate.label_variance_error) == (0.0, 0.0)
    assert total.diagonal_bound is None


def test_the_errors_of_pairs_contain_that_of_the_checks(raw_numbers):
    model, x = net()
    few = measure(model, x, draws="exact").total.i2
    probes = measure(model, x, draws="exact", second_order={"probes": 60}).total.i2
    one, other = (e.pair_variance.relative(1) for e in (few, probes))
    assert abs(one[0] - other[0]) < 4 * (one[1] ** 2 + other[1] ** 2) ** 0.5
    norm = few.pair_variance.norm_square
    assert one[1] > few.label_variance_error / norm


def test_without_bounds_nothing_is_differentiated_twice():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

    class Layer(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    model = nn.Sequential(nn.Linear(4, 5), Layer(), nn.Linear(5, 3))
    smooth = nn.Sequential(model[0], nn.Tanh(), model[2])
    x = torch.randn(16, 4)
    estimate, expected = (measure(m, x).total.i2 for m in (model, smooth))
    assert estimate.label_variance == pytest.approx(expected.label_variance, rel=1e-3)


def test_what_it_does_not_measure_has_a_reason():
    model, x = net()
    estimate = measure(model, x, diagonals=True).total.i2
    assert estimate.diagonal_label_variance is None
    assert "probes" in estimate.unknown["diagonal_label_variance"]
    assert "bounds=True" in estimate.unknown["total_label_variance"]
    half = measure(model.to(torch.bfloat16), x.to(torch.bfloat16)).total.i2
    assert half.label_variance is None and half.pairs_for(0.1) is None
    assert "half precision" in half.unknown["label_variance"]


def test_the_same_seed_gives_the_same_number():
    model, x = net()
    first, second, other = (measure(model, x, seed=s).total.i2.label_variance for s in (3, 3, 4))
    assert first == second != other


def test_the_model_is_as_before():
    model, x = net()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    measure(model, x)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_the_mean_over_processes_is_that_of_their_inputs():
    model, x = net()
    shares = []
    for part in (x[:4], x[4:]):
        problem = spot_problem(model, (part,))
        shares.append(measure_with_fallbacks(problem, make_verified_plan(problem)))
    names = [n for n, _ in model.named_parameters()]
    first, second = (estimate_v2(share.spot_checks, names) for share in shares)
    shares = [_without_moments(share) for share in shares]
    merged = merge(shares, {}).spot_checks
    both = estimate_v2(merged, names)
    assert both.value == pytest.approx(0.25 * first.value + 0.75 * second.value)


def _without_moments(share: Measured) -> Measured:
    empty = {k: dataclasses.replace(m, parameters={}) for k, m in share.moments.items()}
    return dataclasses.replace(share, moments=empty)


class Last(nn.Module):
    """An LSTM whose weights are large, as after a training: its outputs are steep in them."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(5)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class NearKinks(nn.Module):
    """Units whose ReLU is off for every input, but by little."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.a.weight[:8] *= 1e-3
            self.a.bias[:8] = -0.02

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).tanh())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("make", "shape"), [(Last, (32, 8, 8)), (NearKinks, (32, 4))])
def test_steep_models_and_kinks_nearby_are_no_faults(make, shape, seed):
    """Large steps are no derivatives, and cross kinks: the guard compares small ones."""
    torch.manual_seed(seed)
    report = measure(make(), torch.randn(shape), plan=fimprobe.Plan(), seed=seed)
    assert report.total.i2.label_variance > 0
