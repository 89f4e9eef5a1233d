"""Whatever fails inside the probe is told once and never stops or changes training."""

import copy
import logging
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe import BatchError, FimprobeError
from tests.models.small import mlp
from tests.support.bit_identity import LEAN, data, same, streams, train
from tests.support.warnings import warnings_of

step_measurement = sys.modules["fimprobe.probe.step_measurement"]


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble("no way"), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_an_error_inside(error, on_error, monkeypatch, caplog):
    def fail(*args, **kwargs):
        torch.rand(1)
        raise error

    net, twin = mlp(), mlp()
    twin.load_state_dict(net.state_dict())
    monkeypatch.setattr(step_measurement, "measure", fail)
    x, y = data(6, 4)
    probe = fimprobe.attach(net, likelihood="categorical", on_error=on_error, **LEAN)
    if on_error == "raise":
        with pytest.raises(type(error), match=str(error)):
            train(net, 4, x, y)
        assert not warnings_of(caplog)
    else:
        train(net, 4, x, y)
        train(twin, 4, x, y)
        assert same(dict(net.state_dict()), dict(twin.state_dict()))
        (line,) = warnings_of(caplog)
        assert str(error) in line and type(error).__name__ in line and "step 0" in line
        assert not probe.active and probe.steps == 4 and not probe.history
    probe.detach()


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
def test_outputs_that_are_not_finite(likelihood, caplog):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.bad = mlp(), False

        def forward(self, x):
            return self.net(x) * (float("nan") if self.bad else 1.0)

    net = Sometimes()
    x, y = data(6, 4)
    probe = fimprobe.attach(net, likelihood=likelihood, **LEAN)
    frozen = torch.optim.SGD(net.parameters(), lr=0.0)
    weights = copy.deepcopy(net.state_dict())
    for net.bad in (True, False, True, False):
        train(net, 1, x, y, optimizer=frozen)
        net.load_state_dict(weights)  # 0 · NaN
    assert [r.step for r in probe.history] == [1, 3] and probe.active
    assert ["finite" in line for line in warnings_of(caplog)] == [True]
    probe.detach()


@pytest.mark.parametrize(
    ("module", "part"), [("captured_batch", "_versions"), ("capture", "CapturedBatch")]
)
def test_an_error_while_capturing(module, part, monkeypatch, caplog):
    def fail(*args):
        raise Trouble("odd input")

    net, plain = mlp(), mlp()
    plain.load_state_dict(net.state_dict())
    monkeypatch.setattr(sys.modules[f"fimprobe.training.capture.{module}"], part, fail)
    x, y = data(6, 4)
    with fimprobe.attach(net, likelihood="categorical", **LEAN):
        train(net, 4, x, y)
    train(plain, 4, x, y)
    assert same(dict(net.state_dict()), dict(plain.state_dict()))
    assert len(warnings_of(caplog)) == 1 and "Trouble: odd input" in warnings_of(caplog)[0]


def test_random_numbers_in_eval_are_told(caplog):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(F.dropout(x, 0.5, training=True)) + 0 * np.random.rand() * random.random()

    ends = []
    for probed in (True, False):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        net = Noisy()
        probe = fimprobe.attach(net, likelihood="categorical", **LEAN) if probed else None
        train(net, 5, *data(6, 4))
        ends.append((dict(net.state_dict()), streams()))
        if probe is not None:
            assert not probe.history and not probe.active
            probe.detach()
    assert same(*ends)
    (line,) = warnings_of(caplog)
    assert "probing ended at step 0, training continues" in line and "random numbers in eval" in line
    with pytest.raises(FimprobeError, match="random numbers in eval"):
        fimprobe.measure(Noisy(), data(6, 4)[0], likelihood="categorical")


def test_batch_of_one(caplog):
    net = mlp()
    probe = fimprobe.attach(net, likelihood="categorical", draws=1, **LEAN)
    optimizer = train(net, 3, *data(1, 4))
    assert len(warnings_of(caplog)) == 1 and "pass draws=2 or more inputs" in warnings_of(caplog)[0]
    train(net, 1, *data(2, 4), optimizer=optimizer)
    assert [r.step for r in probe.history] == [3]
    probe.detach()
    with fimprobe.attach(net, likelihood="categorical", draws=2, **LEAN) as probe:
        train(net, 1, *data(1, 4))
        i1 = probe.last.total.i1
        assert probe.last.batch_size == 1 and i1.trace > 0
        assert i1.std_error is None and i1.rel_error is None and i1.pairs_for(0.1) is None
        for name in ("std_error", "rel_error", "pairs"):
            assert i1.unknown[name] == "one input is too few for an error; take 5 or more"
    with pytest.raises(BatchError):
        fimprobe.measure(net, torch.ones(1, 4), likelihood="categorical", draws=1)


def test_labels_that_tell_nothing(caplog):
    """No failure: the report holds no number of theirs and says why, training continues."""
    net, plain = mlp(), mlp()
    with torch.no_grad():
        net[2].bias[0] += 30
    plain.load_state_dict(net.state_dict())
    x, _ = data(12, 4)
    y = torch.zeros(12, dtype=torch.long)
    options = {**LEAN, "estimators": ["i1", "i2"], "likelihood": "categorical"}
    with fimprobe.attach(net, label_sampling="model", on_error="raise", **options) as probe:
        train(net, 3, x, y)
    train(plain, 3, x, y)
    assert same(dict(net.state_dict()), dict(plain.state_dict()))
    assert [r.step for r in probe.history] == [0, 1, 2] and not warnings_of(caplog)
    for report in probe.history:
        assert report.seen_mass < 0.5
        for estimate in (report.total.i1, report.total.i2):
            assert estimate.trace is None and estimate.rel_error is None
            assert (
                "of the expected score; pass label_sampling='size_biased'"
                in estimate.unknown["trace"]
            )
        assert any("label_sampling='size_biased'" in line for line in report.advice)
    with fimprobe.attach(net, on_error="raise", **options) as probe:
        train(net, 1, x, y)
    assert 0 < probe.last.total.i1.trace < 1e-9 and probe.last.total.i1.rel_error > 0


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
def test_empty_batch(likelihood, caplog):
    net = mlp()
    probe = fimprobe.attach(net, likelihood=likelihood, **LEAN)
    train(net, 2, *data(6, 4))
    train(net, 2, *data(0, 4))
    train(net, 1, *data(6, 4))
    assert [r.step for r in probe.history] == [0, 1, 4]
    assert len(warnings_of(caplog)) == 1 and "empty batch, shape (0, 4)" in warnings_of(caplog)[0]
    probe.detach()


def test_parameters_left_out_are_named():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.idle = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(torch.tanh(self.frozen(x)))

    net = Partly()
    with fimprobe.attach(net, **LEAN) as probe:
        train(net, 2, *data(6, 4))
        report = probe.last
    want = {
        "frozen.weight": "left out: frozen",
        "frozen.bias": "left out: frozen",
        "idle.weight": "left out: the measured outputs do not depend on it",
        "idle.bias": "left out: the measured outputs do not depend on it",
    }
    assert {n: why for n, why in probe.coverage.items() if why.startswith("left")} == want
    assert report.coverage == probe.coverage
    assert list(report.parameters) == ["used.weight", "used.bias"] and report.total.numel == 27
    (line,) = [line for line in report.advice if line.startswith("Left out")]
    for name, why in want.items():
        assert (f"{name} ({why[10:]})" in line) == ("frozen" not in name)
    assert "2 parameter tensors are frozen and not measured." in report.advice
    assert all(p.grad is None for p in [*net.frozen.parameters(), *net.idle.parameters()])


def test_unwritable_log_dir(tmp_path, caplog, capsys):
    file = tmp_path / "file"
    file.write_text("")
    net = mlp()
    with fimprobe.attach(net, log_dir=file / "run", schedule={"every": 1}, sinks=[Broken()]) as probe:
        train(net, 3, *data(6, 4))
    first, second = warnings_of(caplog)
    assert str(file / "run") in first and "cannot be written" in first
    assert "Broken failed: disk full" in second
    assert probe.log_dir is None and "tensorboard --logdir" not in capsys.readouterr().out
    assert [r.step for r in probe.history] == [0, 1, 2]
    with pytest.raises(FimprobeError, match="cannot be written"):
        fimprobe.attach(net, log_dir=file / "run", on_error="raise")
    fimprobe.attach(net, tensorboard=False).detach()


class Broken:
    def write(self, report):
        raise OSError("disk full")

    def close(self):
        raise AssertionError("it was dropped")


def test_an_output_function_with_a_mistake(caplog):
    net = mlp()
    with fimprobe.attach(net, output=lambda out: 3, **LEAN):
        train(net, 25, *data(6, 4))
    (line,) = warnings_of(caplog)
    assert "could not be decided" in line and "not a single tensor" in line


def test_what_cannot_be_attached_to():
    net = mlp()
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(FimprobeError, match="`model` must have trainable parameters"):
        fimprobe.attach(net, tensorboard=False)
    with pytest.raises(FimprobeError, match="must be a torch.nn.Module, got function"):
        fimprobe.attach(lambda x: x, tensorboard=False)


def test_attaching_twice(caplog):
    net = mlp()
    probe = fimprobe.attach(net, tensorboard=False)
    with pytest.raises(FimprobeError, match=r"already has a probe. Call fimprobe.detach\(model\)"):
        fimprobe.Probe(net)
    for again in (net, torch.compile(net, backend="eager"), nn.DataParallel(net)):
        earlier, probe = probe, fimprobe.attach(again, tensorboard=False)
        assert earlier.detached and not probe.detached
        assert "the model had a probe, which was detached" in warnings_of(caplog)[-1]
    fimprobe.attach(mlp(), tensorboard=False).detach()
    assert fimprobe.detach(net) is probe and fimprobe.detach(net) is None
    with pytest.raises(FimprobeError, match="must be a torch.nn.Module, got str"):
        fimprobe.detach("net")
    caplog.clear()
    with caplog.at_level(logging.INFO), fimprobe.attach(net, **LEAN) as second:
        train(net, 2, *data(6, 4))
    assert len(second.history) == 2 and not probe.history and not warnings_of(caplog)
