"""Every estimator in a plain loop: all tags are written, the data's labels are those of the loop."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe import FimprobeError
from tests.models.small import Tagger, mlp
from tests.support.loop import data, equal, expected, sgd
from tests.support.warnings import warnings_of

ALL = ("i1", "i2", "ih", "empirical")
EVERY = {"schedule": {"every": 1}, "tensorboard": False, "on_error": "raise", "estimators": ALL}
LOG_BOUNDS = {
    "bound_of_covariance_norm": "bound", "bound_of_label_variance": "diagonal_bound",
    "bound_of_total_label_variance": "trace_bound", "covariance_norm": "covariance_norm",
    "total_label_variance": "total_label_variance",
}  # fmt: skip
LOGS = ("input_variance", "label_variance", "pairs_for_10_percent", "trace")
TAGS = {
    "fim/error_of_this_report": "rel_error", "fim/error_with_1_label": "one_label_error",
    "fim_vs_empirical/cosine": "cosine", "fim_vs_empirical/trace_ratio": "trace_ratio",
    **{f"fim/log10_{name}": name for name in LOGS},
    **{f"fim_matrix_bounds/log10_{tag}": name for tag, name in LOG_BOUNDS.items()},
}  # fmt: skip
"""The values in the run of each estimator."""


def value_of(report, estimate, name):
    if name == "pairs_for_10_percent":
        return estimate.pairs_for(0.1)
    if name == "one_label_error":
        return estimate.error_of(inputs=report.batch_size, labels=1)
    return getattr(estimate, name)


def all_equal(report, want, *, known=True):
    """Both reports hold the same numbers of every estimator, up to rounding."""
    equal(report, want, known=known)
    for one, other in zip(
        [*report.parameters.values(), *report.layers.values(), report.total],
        [*want.parameters.values(), *want.layers.values(), want.total],
        strict=True,
    ):
        for kind in ALL:
            mine, its = getattr(one, kind), getattr(other, kind)
            assert (mine is None) == (its is None), kind
            if mine is None:
                continue
            for name in ("trace", "norm", "std_error", "rel_error", "cosine", "trace_ratio"):
                a, b = getattr(mine, name), getattr(its, name)
                assert (a is None) == (b is None)
                assert a is None or a == pytest.approx(b, rel=1e-4, abs=1e-9), (kind, name)


def own_empirical(net, x, y, loss):
    """tr of the mean g gᵀ over the samples' own labels, one sample at a time in float64."""
    net, x = copy.deepcopy(net).double(), x.double() if x.is_floating_point() else x
    total = 0.0
    for b in range(len(x)):
        net.zero_grad()
        loss(net(x[b : b + 1]), y[b : b + 1]).backward()
        total += sum(float(p.grad.square().sum()) for p in net.parameters())
    return total / len(x)


def together(out, y):
    return F.cross_entropy(out, y, reduction="sum")


def train_with_every_estimator(probe, net, draws):
    """Five steps, probed at every second; each report is that of its step's model, rows and labels."""
    optimizer = sgd(net)
    for step in range(5):
        x, y = data(step)
        before = copy.deepcopy(net)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step % 2 == 0:
            rows = torch.randperm(12, generator=torch.Generator().manual_seed(7919 * step))[:8]
            rows = rows.sort()[0]
            options = {"estimators": ALL, "bounds": True, "draws": draws}
            all_equal(probe.last, expected(before, x[rows], step, **options, labels=y[rows]))
            trace = own_empirical(before, x[rows], y[rows], together)
            assert probe.last.total.empirical.trace == pytest.approx(trace, rel=1e-4)
            wrong = expected(before, x[rows], step, **options, labels=(y[rows] + 1) % 3)
            with pytest.raises(AssertionError):  # the comparison sees the labels
                all_equal(probe.last, wrong)


def check_tag(events, tag, estimate_of, name, history):
    """The event file holds the known values, each once; without any there is no tag."""
    values = {r.step: value_of(r, estimate_of(r), name) for r in history}
    known = {step: x for step, x in values.items() if x is not None}
    if "log10" in tag:
        known = {step: math.log10(x) for step, x in known.items() if x > 0}
    assert (tag in events.Tags()["scalars"]) == bool(known), tag
    if known:
        rows = events.Scalars(tag)
        assert {e.step: e.value for e in rows} == pytest.approx(known, rel=1e-5, abs=1e-5), tag
        assert len(rows) == len(known)


def check_run(log_dir, kind, history):
    """The run of an estimator: what is known is written, and nothing else."""
    events = EventAccumulator(str(log_dir / kind))
    events.Reload()
    for tag, name in TAGS.items():
        # the empirical Fisher is no estimator that takes labels from the model
        if kind != "empirical" or name not in ("pairs_for_10_percent", "one_label_error"):
            check_tag(events, tag, lambda r: getattr(r.total, kind), name, history)
    written = set(events.Tags()["scalars"])
    assert {"fim/log10_trace", "fim/error_of_this_report"} <= written
    layers = {"0": "0 Linear", "2": "2 Linear"} if kind in ("i1", "i2") else {}
    for layer, label in layers.items():
        of_layer = {"fim_layer_error": "one_label_error", "fim_layer_log10_trace": "trace"}
        for start, name in of_layer.items():
            get = lambda r, layer=layer: getattr(r.layers[layer], kind)  # noqa: E731
            check_tag(events, f"{start}/{label}", get, name, history)
    assert written <= {*TAGS} | {t for t in written if t.startswith("fim_layer_") and layers}
    return written


def check_record(record, report):
    """The record that is read back holds every field of the whole model's estimates."""
    for group in [record["total"], *record["layers"].values(), *record["parameters"].values()]:
        assert set(ALL) <= set(group)
    for kind in ALL:
        estimate, shown = getattr(report.total, kind), record["total"][kind]
        for f in dataclasses.fields(estimate):
            value = getattr(estimate, f.name)
            if f.name == "pair_variance":
                assert f.name not in shown  # what is made of it is there
            elif not f.name.startswith("diagonal") or f.name.endswith("bound"):
                assert shown[f.name] == (list(value) if isinstance(value, tuple) else value)
        for name in ("pairs_for_10_percent", "one_label_error"):
            assert shown[name] == value_of(report, estimate, name)
        assert shown["pairs_error"] == estimate.pairs_error


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
@pytest.mark.parametrize("draws", [2, "exact"])
def test_every_tag_is_written_and_read_back(draws, likelihood, tmp_path, caplog):
    net = mlp()
    options = {"likelihood": likelihood, "draws": draws, "schedule": {"every": 2}, "batch": 8}
    options["layers"] = {"top": 12}
    with fimprobe.attach(net, log_dir=tmp_path, estimators=ALL, **options) as probe:
        train_with_every_estimator(probe, net, draws)
    history = probe.history
    assert [r.step for r in history] == [0, 2, 4] and not warnings_of(caplog)

    written = {kind: check_run(tmp_path, kind, history) for kind in ALL}
    assert {"fim_vs_empirical/cosine", "fim_vs_empirical/trace_ratio"} <= written["empirical"]
    for kind in ("i1", "i2"):
        assert ("fim_matrix_bounds/log10_covariance_norm" in written[kind]) == (draws == "exact")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("fisher_trace", "moment_norm"):
        shown = {e.step: e.value for e in events.Scalars(f"fim_outputs/log10_{name}")}
        known = {r.step: math.log10(getattr(r.outputs, name)) for r in history}
        assert shown == pytest.approx(known, rel=1e-5, abs=1e-5)

    for record, report in zip(fimprobe.read(tmp_path).reports, history, strict=True):
        check_record(record, report)


def test_labels_of_positions_come_from_the_loop():
    net = Tagger(False)
    tokens, targets = torch.randint(11, (12, 7)), torch.randint(5, (12, 7))
    for row in range(5):
        targets[row, 6 - row :] = -100
    with fimprobe.attach(net, **EVERY, bounds=False) as probe:
        F.cross_entropy(net(tokens).transpose(1, 2), targets).backward()
        report = probe.step()
    mask = targets != -100
    more = {"estimators": ALL, "mask": mask, "labels": targets}
    all_equal(report, expected(net, tokens, 0, **more))

    def loss(out, y):
        return F.cross_entropy(out.transpose(1, 2), y, reduction="sum")

    trace = own_empirical(net, tokens, targets, loss)
    assert report.total.empirical.trace == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bits_come_from_the_loop(reduction):
    net = mlp()
    x, _ = data(count=24)
    y = torch.randint(2, (24, 3)).float()
    with fimprobe.attach(net, likelihood="bernoulli", **EVERY, bounds=False) as probe:
        F.binary_cross_entropy_with_logits(net(x), y, reduction=reduction).backward()
        report = probe.step()
    all_equal(report, expected(net, x, 0, estimators=ALL, likelihood="bernoulli", labels=y))

    def loss(out, target):
        return F.binary_cross_entropy_with_logits(out, target.double(), reduction="sum")

    trace = own_empirical(net, x, y, loss)
    assert report.total.empirical.trace == pytest.approx(trace, rel=1e-4)


def test_a_model_that_is_sure_of_its_labels():
    """Samples whose gradient rounds to zero count as samples, with a score of zero."""
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.mul_(400)
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    y[:20] = net(x).argmax(1)[:20]
    with fimprobe.attach(net, likelihood="categorical", **EVERY, bounds=False) as probe:
        F.cross_entropy(net(x), y).backward()
        report = probe.step()
    all_equal(report, expected(net, x, 0, estimators=ALL, labels=y), known=False)
    trace = own_empirical(net, x, y, together)
    assert report.total.empirical.trace == pytest.approx(trace, rel=1e-4) and trace > 1
    # F itself is one input's: it is seen, by whatever labels, and no error of it is claimed
    h = net.double()(x.double())
    p = h.softmax(1)
    fisher = (p.mul(1 - p).sum(1) * (x.double().square().sum(1) + 1)).mean().item()
    assert report.total.i1.trace == pytest.approx(fisher, rel=1e-5) and 0 < fisher < 1e-5
    assert (
        "too few inputs have a gradient that counts (1.2 of 32)"
        in report.total.i1.unknown["rel_error"]
    )
    assert report.total.i1.effective_inputs < 1.5 and report.error_of("i1") is None


def test_the_last_batch_of_an_accumulation_and_a_scaled_loss():
    net = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = sgd(net)
    with fimprobe.attach(net, **EVERY, likelihood="categorical", bounds=False) as probe:
        before = copy.deepcopy(net)
        for micro in range(3):
            x, y = data(micro)
            scaler.scale(F.cross_entropy(net(x), y) / 3).backward()
        scaler.step(optimizer)
    all_equal(probe.last, expected(before, x, 0, estimators=ALL, labels=y))


def test_given_labels_win():
    net = mlp()
    x, y = data()
    with fimprobe.attach(
        net, **EVERY, likelihood="categorical", bounds=False, labels=lambda args, kwargs: 2 - y
    ) as probe:
        F.cross_entropy(net(x), y).backward()
        report = probe.step()
    all_equal(report, expected(net, x, 0, estimators=ALL, labels=2 - y))


def test_the_default_schedule_has_labels_whenever_it_measures(caplog):
    net = mlp()
    optimizer = sgd(net)
    options = {"tensorboard": False, "estimators": ALL, "schedule": {"budget": 0.5}}
    with fimprobe.attach(net, likelihood="categorical", **options) as probe:
        for step in range(60):
            x, y = data(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert not warnings_of(caplog) and 1 <= len(probe.history) < 60
    assert all(r.total.empirical is not None for r in probe.history)


@pytest.mark.parametrize("only", [False, True])
def test_labels_that_cannot_be_read_are_told_once_and_the_rest_is_measured(only, caplog):
    net = mlp()
    optimizer = sgd(net)
    options = {**EVERY, "on_error": "warn", "likelihood": "categorical", "bounds": False}
    options["estimators"] = ["empirical"] if only else ALL
    with fimprobe.attach(net, options) as probe:
        for step in range(4):
            x, y = data(step)
            hard = step == 2
            optimizer.zero_grad()
            before = copy.deepcopy(net)
            F.cross_entropy(net(x), y if hard else F.one_hot(y, 3) * 0.4 + 0.2).backward()
            optimizer.step()
            want = expected(before, x, step, estimators=("i1",) if only else ALL[:3])
            if not hard:
                all_equal(probe.last, want)
            assert probe.active and (probe.last.total.empirical is not None) == hard
    (line,) = warnings_of(caplog)
    assert "no empirical Fisher" in line and "Pass labels= a function" in line
    assert [r.step for r in probe.history] == [0, 1, 2, 3]


def test_a_family_whose_labels_cannot_be_read_needs_them_given(caplog):
    net = mlp()
    x, _ = data()
    y = torch.randn(12, 3)
    family = fimprobe.likelihoods.Gaussian(sigma=0.5)
    options = {**EVERY, "likelihood": family, "bounds": False}
    with fimprobe.attach(net, options) as probe:
        F.mse_loss(net(x), y).backward()
        with pytest.raises(FimprobeError, match="likelihood='gaussian' cannot be read off the loss"):
            probe.step()
    with fimprobe.attach(net, options, labels=lambda args, kwargs: y) as probe:
        F.mse_loss(net(x), y).backward()
        report = probe.step()
    all_equal(report, expected(net, x, 0, estimators=ALL, likelihood=family, labels=y))

    def loss(out, target):
        return (out - target.double()).square().sum() / (2 * 0.5**2)

    assert report.total.empirical.trace == pytest.approx(own_empirical(net, x, y, loss), rel=1e-4)


def test_a_step_with_inputs_of_ones_own_has_no_labels():
    net = mlp()
    with fimprobe.attach(net, **EVERY, likelihood="categorical") as probe:
        report = probe.step(data()[0])
    more = {"estimators": ALL[:3], "bounds": True}
    all_equal(report, expected(net, data()[0], 0, **more))
