"""Models that predict a mean and a variance: measurements against quadrature, and trainings."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.likelihoods import HeteroscedasticGaussian
from tests.oracles import brute_force

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(6, 2, generator=torch.Generator().manual_seed(2))


class MeanAndVariance(nn.Module):
    """Two heads on one hidden layer, returned in one of several forms."""

    def __init__(self, form=tuple, head=F.softplus, variances=2):
        super().__init__()
        self.body, self.mean = nn.Linear(3, 3), nn.Linear(3, 2)
        self.raw = nn.Linear(3, variances)
        self.form, self.head = form, head

    def forward(self, x):
        hidden = self.body(x).tanh()
        mean, variance = self.mean(hidden), self.head(self.raw(hidden))
        return {
            tuple: lambda: (mean, variance),
            "swapped": lambda: (variance, mean),
            "names": lambda: {"features": hidden, "loc": mean, "spread": variance},
            "fewer": lambda: (mean, variance.squeeze(-1)),
            "joined": lambda: torch.cat([mean, variance], 1),
        }[self.form]()


def pair(returned):
    """The mean and the variance of any form, as a loop would pick them."""
    if isinstance(returned, dict):
        return returned["loc"], returned["spread"]
    if isinstance(returned, torch.Tensor):
        return returned[:, :2], returned[:, 2:]
    return returned


def natural(returned):
    mean, variance = returned
    return torch.stack([mean / variance, -0.5 / variance.expand(mean.shape)], -1)


@pytest.mark.parametrize(("head", "variances"), [(F.softplus, 2), (torch.exp, 1)])
def test_estimates_equal_quadrature(head, variances, double):
    torch.manual_seed(0)
    model, x = MeanAndVariance(head=head, variances=variances), X.double()
    report = fimprobe.measure(
        model,
        x,
        likelihood="heteroscedastic_gaussian",
        draws="exact",
        estimators=("i1", "i2", "ih"),
        second_order={"probes": 16},
    )
    labels = brute_force.mean_and_variance_labels
    table = brute_force.enumerate_fisher(model, (x,), labels, natural)
    for name in ("", "body.weight", "raw.bias"):
        want = brute_force.summarise(*table, name)
        group = report.total if name == "" else report.parameters[name]
        assert group.i1.trace == pytest.approx(float(want["diagonal"].sum()), rel=1e-9)
        assert group.ih.trace == pytest.approx(group.i1.trace, rel=1e-9)
        assert group.i1.label_variance == pytest.approx(float(want["label"].sum()), rel=1e-9)
        assert group.i1.total_label_variance == pytest.approx(want["l1"], rel=1e-9)
    dense = [brute_force.Dense(model, (x,), b, labels, natural) for b in range(len(x))]
    v2 = sum(float(d.v2.sum()) for d in dense) / len(x)
    i2 = report.total.i2
    assert i2.trace == pytest.approx(report.total.i1.trace, rel=1e-9)
    assert abs(i2.label_variance - v2) <= 3 * i2.probe_error


def test_draws_are_unbiased(double):
    torch.manual_seed(0)
    model, x = MeanAndVariance(), X.double()
    options = {"likelihood": HeteroscedasticGaussian(), "second_order": "off", "bounds": False}
    exact = fimprobe.measure(model, x, draws="exact", **options).total.i1
    many = fimprobe.measure(model, x, draws=400, **options).total.i1
    error = (exact.label_variance / (400 * len(x))) ** 0.5
    assert many.label_variance == pytest.approx(exact.label_variance, rel=0.5)
    assert many.trace == pytest.approx(exact.trace, abs=12 * error)  # of a sum over the entries


def train(form, *, probed, output=None, head=F.softplus, variances=2, variance_of=lambda v: v):
    """Two steps of a plain loop; the parameters, and the probe."""
    torch.manual_seed(0)
    model = MeanAndVariance(form, head, variances)
    criterion = nn.GaussianNLLLoss(full=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = None
    if probed:
        probe = fimprobe.attach(
            model,
            loss=criterion,
            output=output,
            schedule={"every": 1},
            bounds=False,
            second_order="off",
            tensorboard=False,
            log_dir=None,
        )
    for _ in range(2):
        mean, variance = pair(model(X))
        if form == "swapped":
            mean, variance = variance, mean
        optimizer.zero_grad()
        criterion(mean, TARGETS, variance_of(variance)).backward()
        optimizer.step()
    if probe is not None:
        probe.detach()
    return [p.detach().clone() for p in model.parameters()], probe


FORMS = [(tuple, 2, "'0' and '1'"), ("swapped", 2, "'1' and '0'"), ("names", 2, "'loc' and 'spread'")]
FORMS += [(tuple, 1, "'0' and '1'"), ("fewer", 1, "'0' and '1'")]


@pytest.mark.parametrize(("form", "variances", "names"), FORMS)
def test_gradients_show_which_outputs_are_read(form, variances, names):
    plain, _ = train(form, probed=False, variances=variances)
    parameters, probe = train(form, probed=True, variances=variances)
    assert all(torch.equal(a, b) for a, b in zip(plain, parameters, strict=True))
    assert len(probe.history) == 2 and probe.decision.endswith(f"outputs {names}")
    assert "below eps=1e-06 are skipped" in probe.decision
    torch.manual_seed(0)
    model = MeanAndVariance(tuple, variances=variances)
    own = fimprobe.measure(model, X, likelihood=HeteroscedasticGaussian(), seed=probe.config.seed)
    assert probe.history[0].total.i1.trace == pytest.approx(own.total.i1.trace, rel=1e-5)


def test_what_is_no_pair_is_refused_with_the_remedy(caplog):
    caplog.set_level(logging.WARNING, logger="fimprobe")
    for form, options in (
        ("joined", {}),
        (tuple, {"head": lambda raw: raw, "variance_of": torch.exp}),  # a logarithm
        (tuple, {"variance_of": torch.square}),  # a standard deviation
    ):
        caplog.clear()
        _, probe = train(form, probed=True, **options)
        assert not probe.history and "Pass output= a function" in caplog.text
    _, probe = train("joined", probed=True, output=pair)
    assert len(probe.history) == 2


def test_variances_that_the_criterion_clamps_are_skipped(caplog):
    caplog.set_level(logging.WARNING, logger="fimprobe")
    _, probe = train(tuple, probed=True, head=torch.relu)
    assert not probe.history and "variance must be at least eps=1e-06" in caplog.text


@pytest.mark.parametrize("variance", [1e-8, 1e8])
def test_small_and_large_variances_scale(variance):
    """With the means in units of the standard deviation, F of the mean's bias is Σ 1/v."""
    torch.manual_seed(0)
    model = MeanAndVariance(head=lambda raw: variance * raw.exp())
    with torch.no_grad():
        model.raw.weight.zero_()
        model.raw.bias.zero_()
    report = fimprobe.measure(model, X, likelihood=HeteroscedasticGaussian(), draws="exact")
    assert report.parameters["mean.bias"].i1.trace == pytest.approx(2 / variance, rel=1e-4)
    # d log v/d bias = 1: E (z² − 1)²/4 = 1/2
    assert report.parameters["raw.bias"].i1.trace == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(fimprobe.FimprobeError, match="lost in the rounding of the outputs"):
        fimprobe.measure(model, X, likelihood=HeteroscedasticGaussian(), second_order="spot_checks")
