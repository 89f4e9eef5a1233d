"""The example's own family: its moments, and measurements with it, against enumerated counts."""

import importlib.util
import itertools
import math
import sys

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from tests.oracles import brute_force
from tests.support.paths import EXAMPLES

PATH = EXAMPLES / "own_family.py"
MOST = 400


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("own_family", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_family"] = module
    spec.loader.exec_module(module)
    return module


def pmf(mean, r, most=MOST):
    """P(Y = k) for k < most."""
    return [
        math.exp(
            math.lgamma(k + r)
            - math.lgamma(r)
            - math.lgamma(k + 1)
            + r * math.log(r / (r + mean))
            + k * math.log(mean / (r + mean))
        )
        for k in range(most)
    ]


def labels_of(r, most):
    """Every vector of counts below ``most``, its probability and its score, by finite sums."""

    def labels(h):
        means = [math.exp(a) for a in h.tolist()]
        tables = [pmf(m, r, most) for m in means]
        for ys in itertools.product(range(most), repeat=len(h)):
            weight = math.prod(t[y] for t, y in zip(tables, ys, strict=True))
            # d/da of k log(μ/(r+μ)) + r log(r/(r+μ)) with dμ/da = μ
            score = [y - (r + y) * m / (r + m) for y, m in zip(ys, means, strict=True)]
            yield torch.tensor(weight, dtype=h.dtype), torch.tensor(score, dtype=h.dtype)

    return labels


@pytest.mark.parametrize("r", [0.7, 2.0, 9.0])
@pytest.mark.parametrize("mean", [0.05, 1.0, 6.0])
def test_moments_equal_enumeration(example, r, mean, double):
    family = example.NegativeBinomial(r)
    h = torch.tensor([[math.log(mean)]])
    p = torch.tensor(pmf(mean, r))
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    score = family.score(h.expand(MOST, 1), torch.arange(MOST)[:, None])[:, 0]
    want = torch.tensor([float(d) for _, d in labels_of(r, MOST)(h[0])])
    assert torch.allclose(score, want, rtol=1e-11, atol=1e-12)
    assert float(p @ want) == pytest.approx(0, abs=1e-11)
    assert float(family.variance(h)) == pytest.approx(float(p @ want**2), rel=1e-9)
    assert float(family.fourth_moment(h)) == pytest.approx(float(p @ want**4), rel=1e-9)


@pytest.mark.parametrize("r", [0.7, 2.0])
def test_quantile_is_the_smallest_sufficient_count(example, r, double):
    h = torch.tensor([-2.0, 0.0, 1.5])
    u = torch.linspace(1e-6, 1 - 1e-7, 300)
    y = example.NegativeBinomial(r).quantile(h.expand(300, 3), u[:, None].expand(300, 3))
    for j, a in enumerate(h.tolist()):
        cdf = torch.tensor(pmf(math.exp(a), r)).cumsum(0)
        assert torch.equal(y[:, j], torch.searchsorted(cdf, u).to(y.dtype))


@pytest.mark.parametrize("r", [0.7, 2.0])
def test_probabilities_are_those_of_the_counts(example, r, double):
    h = torch.tensor([[-2.0, 0.0], [1.5, 2.0]])
    p = example.NegativeBinomial(r).probabilities(h)
    assert p.shape == (2, 2, 512) and p.dtype == torch.float64
    for a, mine in zip(h.flatten().tolist(), p.flatten(0, 1), strict=True):
        want = torch.tensor(pmf(math.exp(a), r, 512))
        assert torch.allclose(mine, want, rtol=1e-9, atol=1e-300)


def small():
    """A net with two means near 0.3, so that 30 counts hold all the probability."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        net[2].bias -= 1.5
        net[2].weight *= 0.5
    return net, torch.randn(3, 3)


def test_exact_draws_equal_enumeration(example, double):
    net, x = small()
    assert float(net(x).detach().max()) < -0.6
    oracle = brute_force.enumerate_fisher(net, (x,), labels_of(2.0, 40))
    report = fimprobe.measure(net, x, likelihood=example.NegativeBinomial(2.0), draws="exact")
    assert report.likelihood == "negative binomial"
    for n, group in [*report.parameters.items(), ("", report.total)]:
        want, have = brute_force.summarise(*oracle, n), group.i1
        assert have.trace == pytest.approx(float(want["diagonal"].sum()), rel=1e-8)
        assert have.label_variance == pytest.approx(float(want["label"].sum()), rel=1e-8)
        assert have.input_variance == pytest.approx(float(want["input"].sum()), rel=1e-8)
        assert have.total_label_variance == pytest.approx(want["l1"], rel=1e-8)


@pytest.mark.parametrize("label_sampling", ["size_biased", "model"])
def test_sampled_traces_are_unbiased(label_sampling, example, double, raw_numbers):
    net, x = small()
    x = torch.cat([x] * 5)  # as many labels as of five measurements
    options = {"likelihood": example.NegativeBinomial(2.0), "bounds": False, "estimators": ("i1",)}
    exact = fimprobe.measure(net, x, draws="exact", **options).total.i1
    options |= {"draws": 4, "label_sampling": label_sampling}
    options["plan"] = Plan()  # made by the first measurement and kept, as a probe does
    reports = [fimprobe.measure(net, x, seed=s, **options) for s in range(40)]
    assert {r.label_sampling for r in reports} == {label_sampling}
    for kind in ("trace", "label_variance", "total_variance", "total_label_variance"):
        seen = torch.tensor([getattr(r.total.i1, kind) for r in reports])
        error = float(seen.std()) / len(seen) ** 0.5
        assert abs(float(seen.mean()) - getattr(exact, kind)) < 4 * error, kind
        assert error < 0.2 * getattr(exact, kind), kind


def test_rare_counts_are_drawn_where_the_score_is_large(example, double, raw_numbers):
    """With means near e⁻⁹ counts above zero carry all of F, and draws from the model miss them."""
    net, x = small()
    with torch.no_grad():
        net[2].bias -= 8
    family = example.NegativeBinomial(2.0)
    exact = fimprobe.measure(net, x, likelihood=family, draws="exact").total.i1
    options = {"likelihood": family, "draws": 4, "bounds": False}
    report = fimprobe.measure(net, x, **options)
    assert abs(report.total.i1.trace - exact.trace) < 0.2 * exact.trace
    plain = fimprobe.measure(net, x, label_sampling="model", **options)
    assert plain.total.i1.trace < 0.01 * exact.trace and plain.seen_mass < 0.01


def test_the_example_prints_its_report(example, capsys):
    example.main()
    out = capsys.readouterr().out
    assert "negative binomial" in out and "64 inputs" in out and "4 size-biased labels" in out
