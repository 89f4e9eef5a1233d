"""Where Î₂ says nothing it is left out under a budget, unless it was asked for."""

import dataclasses

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.estimators.pair_variance import PairVariance
from fimprobe.probe import step_measurement
from fimprobe.probe.second_order_choice import share_of_i2, why_i2_says_nothing
from tests.support.loop import backward, data
from tests.support.warnings import warnings_of


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def report():
    """A report of two layers, with exact labels."""
    options = {"likelihood": "categorical", "draws": "exact", "second_order": "exact"}
    return fimprobe.measure(small_net(), data()[0], **options)


def with_i2(report, *, layers=None, **total):
    """The report with other fields of Î₂, of the model and of each layer."""

    def changed(group, values):
        return dataclasses.replace(group, i2=dataclasses.replace(group.i2, **values))

    names = list(report.layers)
    groups = {
        name: changed(report.layers[name], values)
        for name, values in zip(names, layers or [{}] * len(names), strict=True)
    }
    return dataclasses.replace(report, layers=groups, total=changed(report.total, total))


def test_exact_numbers_are_never_lost(report):
    assert why_i2_says_nothing(report, of_layers=True) == ""
    assert (
        why_i2_says_nothing(with_i2(report, layers=[{"label_variance": None}] * 2), of_layers=True)
        == ""
    )


LOST = {"label_variance": None, "label_variance_error": 1.0}
NOISY = {"label_variance": 1.9, "label_variance_error": 1.0}
CLEAR = {"label_variance": 2.1, "label_variance_error": 1.0}


@pytest.mark.parametrize(
    ("layers", "lost"),
    [([LOST, NOISY], 2), ([LOST, CLEAR], 0), ([CLEAR, CLEAR], 0), ([NOISY, NOISY], 2)],
)
def test_most_layers_within_their_noise(report, layers, lost):
    reason = why_i2_says_nothing(with_i2(report, layers=layers), of_layers=True)
    assert reason == (f"its label variance is within its noise in {lost} of 2 layers" if lost else "")


def test_spot_checks_are_judged_by_the_model(report):
    lost = with_i2(report, layers=[LOST, NOISY])
    assert why_i2_says_nothing(lost, of_layers=False) == ""
    reason = why_i2_says_nothing(with_i2(report, **NOISY), of_layers=False)
    assert reason == "its label variance is within its noise"


def test_an_efficiency_below_one_percent(report):
    sure = ((0.0,) * 3,) * 3

    def needing(pairs):
        variance = PairVariance(fourth=pairs + 1.0, square=1.0, norm_square=1.0, covariance=sure)
        return with_i2(report, pair_variance=variance)

    ratio = needing(1.0).total.i2.pairs_for(0.1)
    pairs = report.total.i1.pairs_for(0.1)
    assert why_i2_says_nothing(needing(99 * pairs / ratio), of_layers=True) == ""
    reason = why_i2_says_nothing(needing(150 * pairs / ratio), of_layers=True)
    assert reason == "it needs 150 times as many (input, label) pairs as Î₁"


def test_without_i2_there_is_nothing_to_leave_out():
    alone = fimprobe.measure(small_net(), data()[0], likelihood="categorical", estimators=("i1",))
    assert why_i2_says_nothing(alone, of_layers=True) == "" and share_of_i2(alone) == 0.0


@pytest.mark.parametrize(
    ("options", "is_left_out"),
    [
        ({}, True),
        ({"schedule": {"every": 1}}, False),
        ({"estimators": ["i1", "i2"]}, False),
        ({"second_order": {"probes": 2}}, False),
    ],
)
def test_it_is_left_out_after_the_first_whole_report(
    options, is_left_out, monkeypatch, caplog, capsys
):
    monkeypatch.setattr(step_measurement, "why_i2_says_nothing", lambda report, **_: "it is noise")
    net = small_net()
    with fimprobe.attach(net, likelihood="categorical", tensorboard=False, **options) as probe:
        for step in range(6):
            backward(net, step)
            probe.step()
    measured = [r.total.i2 is not None for r in probe.history]
    assert measured == [True] + [not is_left_out] * (len(measured) - 1) and len(measured) > 2
    notes = [[note for note in r.notes if note.startswith("Î₂ is left out")] for r in probe.history]
    assert [len(n) for n in notes] == [0] + [int(is_left_out)] * (len(notes) - 1)
    assert len(warnings_of(caplog)) == is_left_out
    closing = capsys.readouterr().err
    assert ("it is noise. This saves about" in closing) == is_left_out
    assert ("Pass estimators=['i1', 'i2'] to keep it." in closing) == is_left_out
