"""What trackers are sent is what TensorBoard shows; the example's sink fits W&B's and MLflow's calls."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from own_sink import TrackerSink  # noqa: E402
from own_sink import main as run_example  # noqa: E402


class WandbRun:
    """``wandb.Run.log(data, step=None)``: steps may not go back."""

    def __init__(self):
        self.rows = {}

    def log(self, data, step=None):
        assert step is not None
        assert step > max(self.rows, default=-1)
        self.rows[step] = data


class Mlflow:
    """``mlflow.log_metrics(metrics, step=None)``: floats, names of a limited alphabet."""

    def __init__(self):
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            assert re.fullmatch(r"[/\w.\- ]*", name), name
            assert type(value) is float
            assert math.isfinite(value)
        self.rows[step] = metrics


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def test_trackers_get_what_tensorboard_shows(net, tmp_path):
    wandb, mlflow = WandbRun(), Mlflow()
    sinks = [TrackerSink(wandb.log), TrackerSink(mlflow.log_metrics)]
    options = {"likelihood": "categorical", "draws": "exact"}
    with fimprobe.attach(net, log_dir=tmp_path, sinks=sinks, **options) as probe:
        for _ in range(2):
            probe.step(torch.randn(8, 4))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    board = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    names = {tag for tag in board if tag.startswith(("fim/", "fim_bounds/", "fim_layers/"))}
    assert {"fim/i1/rel_error", "fim_layers/2/i2_rel_error", "fim_probe/seconds"} <= set(board)
    for report in probe.history:
        scalars = report.scalars()
        for tag in names:
            values = [e.value for e in board[tag] if e.step == report.step]
            assert values == [pytest.approx(scalars[tag], rel=1e-6, abs=0)], tag
        assert wandb.rows[report.step] == mlflow.rows[report.step] == scalars


def test_scalars_are_finite_and_of_the_layers_asked_for(net):
    report = fimprobe.measure(net, torch.randn(4, 4), likelihood="categorical", draws=1)
    assert report.total.i1.label_variance is None
    scalars = report.scalars(layers=["2"])
    assert "fim/i1/label_variance" not in scalars
    assert scalars["fim_layers/2/i1_trace"] == report.layers["2"].i1.trace
    assert {t.split("/")[1] for t in scalars if t.startswith("fim_layers")} == {"2"}
    assert not any(t.startswith("fim_layers") for t in report.scalars(layers=[]))
    layers = {t.split("/")[1] for t in report.scalars() if t.startswith("fim_layers")}
    assert layers == {"0", "2"}
    infinite = type(report.total.i1)(math.inf, *[math.nan] * 3, *[None] * 4)
    broken = fimprobe.Report(0, 1, 1, 0.5, "", {}, {}, fimprobe.GroupEstimates(1, infinite))
    assert set(broken.scalars()) == {"fim_probe/seconds"}


def test_names_of_layers_that_trackers_refuse(tmp_path):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return x @ self.weight

    mlflow = Mlflow()
    sinks = [TrackerSink(mlflow.log_metrics)]
    with fimprobe.attach(Raw(), sinks=sinks, likelihood="gaussian", tensorboard=False) as probe:
        probe.step(torch.randn(4, 3))
    assert "fim_layers/_model_/i1_trace" in mlflow.rows[0]


def test_a_tracker_that_fails_is_dropped_and_told_once(net, caplog):
    calls = []

    def log(values, step):
        calls.append(step)
        raise ConnectionError("no route to the tracker")

    options = {"likelihood": "categorical", "tensorboard": False}
    with fimprobe.attach(net, sinks=[TrackerSink(log)], **options) as probe:
        for _ in range(3):
            assert probe.step(torch.randn(4, 4)) is not None
    assert calls == [0]
    assert caplog.text.count("no route to the tracker") == 1


def test_the_example_runs(capsys):
    run_example()
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    assert [x.split(":")[0] for x in lines] == ["step 0", "step 10", "step 20"]
