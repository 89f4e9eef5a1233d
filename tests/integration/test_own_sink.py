"""What trackers are sent is what TensorBoard shows; the example's sink fits W&B's and MLflow's calls."""

import math
import re

import pytest
import torch
from own_sink import TrackerSink
from own_sink import main as run_example
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe


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
    for report in probe.history:
        scalars = report.scalars()
        for key in ("i1", "i2"):
            events = EventAccumulator(str(tmp_path / key))
            events.Reload()
            for name, tag in (
                ("rel_error", "error_of_this_report"),
                ("one_label_error", "error_with_1_label"),
            ):
                (value,) = [e.value for e in events.Scalars(f"fim/{tag}") if e.step == report.step]
                assert value == pytest.approx(scalars[f"fim/{key}/{name}"], rel=1e-6, abs=0)
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
    values = dict.fromkeys(("norm", "label_variance", "input_variance", "rel_error"), math.nan)
    infinite = type(report.total.i1)(trace=math.inf, **values)
    broken = fimprobe.Report(
        step=0, batch_size=1, draws=1, seconds=0.5, likelihood="", parameters={}, layers={},
        total=fimprobe.GroupEstimates(numel=1, i1=infinite),
    )  # fmt: skip
    assert set(broken.scalars()) == {"fim_probe/seconds"}


def test_scalars_of_the_outputs_are_those_of_enumeration(net, double):
    net, x = net.double(), torch.randn(9, 4)
    scalars = fimprobe.measure(net, x, likelihood="categorical").scalars()
    found = {"fisher_trace": [], "fisher_norm": [], "moment_norm": []}
    for p in torch.softmax(net(x).detach(), 1):
        delta = torch.eye(2) - p  # a row for each label
        fisher = torch.einsum("y,ya,yb->ab", p, delta, delta)
        fourth = torch.einsum("y,ya,yb,yc,yd->abcd", p, *[delta] * 4)
        moment = fourth - torch.einsum("ab,cd->abcd", fisher, fisher)
        found["fisher_trace"].append(fisher.trace())
        found["fisher_norm"].append(fisher.norm())
        found["moment_norm"].append(moment.norm())
    for name, values in found.items():
        assert scalars[f"fim_outputs/{name}"] == pytest.approx(float(torch.stack(values).mean()))
    # without bounds only what every measurement knows; a Gaussian's is that of its sigma
    options = {"bounds": False, "estimators": ("i1",)}
    scalars = fimprobe.measure(net, x, likelihood="categorical", **options).scalars()
    names = {tag for tag in scalars if tag.startswith("fim_outputs/")}
    assert names <= {"fim_outputs/fisher_trace"}


@pytest.mark.parametrize("name", ["three inputs", "unseen"])
def test_what_is_unknown_is_no_scalar(net, name):
    """Tags of numbers that are None are missing: neither 0 nor nan is written in their place."""
    with torch.no_grad():
        net[2].bias[0] += 12.0 if name == "unseen" else 0.0
    options = {"label_sampling": "model"} if name == "unseen" else {}
    x = torch.randn(40 if name == "unseen" else 3, 4)
    report = fimprobe.measure(net, x, likelihood="categorical", **options)
    scalars, unknown = report.scalars(), 0
    for kind in ("i1", "i2"):
        for prefix, group in [
            (f"fim/{kind}/", report.total),
            *[(f"fim_layers/{n}/{kind}_", g) for n, g in report.layers.items()],
        ]:
            e = getattr(group, kind)
            shown = {n: getattr(e, n) for n in ("trace", "rel_error", "label_variance")}
            shown["one_label_error"] = e.error_of(inputs=len(x))
            shown["pairs_for_10_percent"] = e.pairs_for(0.1)
            for field, value in shown.items():
                assert scalars.get(prefix + field) == value, (prefix, field)
                unknown += value is None
    assert unknown >= (30 if name == "unseen" else 18)
    assert all(type(v) is float and math.isfinite(v) for v in scalars.values())


def test_names_of_layers_that_trackers_refuse(tmp_path):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return x @ self.weight

    mlflow = Mlflow()
    sinks = [TrackerSink(mlflow.log_metrics)]
    net = Raw()
    with fimprobe.attach(net, sinks=sinks, likelihood="gaussian", tensorboard=False) as probe:
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
