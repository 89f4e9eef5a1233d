"""Outputs at the edges of float64, families that depart from their parents, F in few inputs."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.likelihoods import Bernoulli
from fimprobe.likelihoods.size_biased import has_size_biased_draws


def net(bias=0.0, outputs=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
    model[2].bias.data[0] += bias
    return model


def inputs(size=8):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def strict(report):
    """The record as JSON, which has no NaN and no infinity; no error in the words either."""
    assert "nan" not in str(report).lower().replace("nanosecond", "")
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("bias", [38.0, 100.0, 300.0, 1e4])
@pytest.mark.parametrize("family", ["categorical", "bernoulli", "poisson"])
def test_reports_of_extreme_outputs_are_numbers_or_none_with_a_reason(family, bias, draws):
    try:
        report = fimprobe.measure(net(bias), inputs(), likelihood=family, draws=draws)
    except fimprobe.FimprobeError:
        return  # told in words
    record = strict(report)
    for kind in ("i1", "i2"):
        for name in ("trace", "norm", "rel_error"):
            value = record["total"][kind][name]
            assert (value is None) == (name in record["total"][kind]["unknown"]), (kind, name)
            assert value is None or value >= 0


def test_counts_beyond_whole_numbers_are_not_told_by_size_biased_labels(double):
    """Rates above 5e11 have no rare labels: they come from the model, and match the exact ones."""
    model, x = net(29.0).double(), inputs(64).double()
    drawn = fimprobe.measure(model, x, likelihood="poisson", draws=16, bounds=False)
    exact = fimprobe.measure(model, x, likelihood="poisson", draws="exact", bounds=False)
    assert drawn.label_sampling == "model"
    have, want = drawn.total.i1, exact.total.i1
    assert abs(have.label_variance - want.label_variance) < 4 * have.label_variance_error


class Probit(Bernoulli):
    """Another link: its score and variance are not those of the logit."""

    def score(self, outputs, labels):
        return super().score(1.6 * outputs, labels) * 1.6

    def variance(self, outputs):
        return super().variance(1.6 * outputs) * 2.56


class Counted(Probit):
    """It gives probabilities, but the parent's draws are still in their way."""

    def probabilities(self, outputs):
        p = torch.sigmoid(1.6 * outputs.double())
        return torch.stack([1 - p, p], -1)


@pytest.mark.parametrize("family", [Probit, Counted])
def test_a_family_that_departs_from_its_parent_does_not_inherit_its_draws(family):
    h = torch.zeros(3, 2)
    assert has_size_biased_draws(Bernoulli(), h) and not has_size_biased_draws(family(), h)
    report = fimprobe.measure(net(), inputs(), likelihood=family(), estimators="i1", bounds=False)
    assert report.label_sampling == "model" and report.seen_mass is not None


def test_second_estimators_claim_nothing_where_too_few_inputs_carry_f():
    """One ±1 vector for each input hides a heavy tail; Î₁'s labels show it."""
    torch.manual_seed(5)
    pool, model = torch.randn(400, 4), net(3.0)
    model[2].weight.data *= 6
    withheld = 0
    for seed in range(20):
        rows = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:32]
        total = fimprobe.measure(model, pool[rows], likelihood="categorical", seed=seed).total
        assert total.i1.effective_inputs == pytest.approx(total.i2.effective_inputs)
        if "too few inputs" in total.i1.unknown.get("std_error", ""):
            withheld += 1
            assert total.i2.std_error is None and total.i2.pairs_for(0.1) is None
    assert withheld > 0


def test_a_norm_that_is_rounding_is_none():
    """One input carries all: nothing of the norm is left without its noise."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x) * x[:, :1]

    x = inputs()
    x[1:, 0] = 0
    e = fimprobe.measure(One(), x, likelihood="bernoulli").total.i1
    assert e.norm is None and "noise" in e.unknown["norm"] and e.trace > 0


def test_a_layer_whose_labels_were_not_seen_claims_nothing():
    """The whole model's labels are seen, those of one sure head are not."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.b.bias.data[0] = 9.0

        def forward(self, x):
            k = (x[:, :1] > 0).float()
            return self.a(x) * (1 - k) + k * self.b(x)

    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))
    report = fimprobe.measure(
        Two(), x, likelihood="categorical", label_sampling="model", bounds=False
    )
    layer = report.layers["b"]
    assert 0.5 < report.seen_mass < 2
    for e in (layer.i1, layer.i2):
        assert e.std_error is None and e.rel_error is None and e.pairs_for(0.1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("sigma", [1e-300, 1e-100, 1e-20, 1e20, 1e160, 1e300])
def test_any_sigma_gives_numbers_or_none_with_a_reason(sigma, draws, dtype):
    model, likelihood = net().to(dtype), fimprobe.likelihoods.Gaussian(sigma=sigma)
    try:
        report = fimprobe.measure(model, inputs().to(dtype), likelihood=likelihood, draws=draws)
    except fimprobe.FimprobeError:
        return  # in words
    record = strict(report)["total"]["i1"]
    assert all(record[name] is not None or name in record["unknown"] for name in ("trace", "norm"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e10, 1e30, 1e60, 1e100, 1e200, 1e300])
def test_any_labels_give_numbers_or_none_with_a_reason(size, dtype):
    model, labels = net().to(dtype), torch.full((8, 3), size, dtype=torch.float64)
    options = {"likelihood": "gaussian", "estimators": ("i1", "empirical"), "labels": labels}
    try:
        report = fimprobe.measure(model, inputs().to(dtype), **options)
    except fimprobe.FimprobeError:
        return  # in words
    record = strict(report)["total"]["empirical"]
    for name in ("trace", "norm", "cosine", "trace_ratio"):
        assert record[name] is not None or name in record["unknown"], name


def test_a_number_that_json_does_not_have_is_none_with_a_reason():
    report = fimprobe.measure(net(), inputs(), likelihood="categorical")
    total = report.total
    values = {"trace": math.nan, "label_variance": math.inf, "bound": -math.inf}
    broken = dataclasses.replace(total, i1=dataclasses.replace(total.i1, **values))
    record = json.loads(
        json.dumps(
            dataclasses.replace(report, total=broken, seen_mass=math.nan).to_dict(), allow_nan=False
        )
    )
    assert record["seen_mass"] is None
    for name in values:
        assert record["total"]["i1"][name] is None
        assert record["total"]["i1"]["unknown"][name]
