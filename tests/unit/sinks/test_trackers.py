"""W&B and MLflow: what their calls receive; offline, where the packages are installed."""

import importlib.util
import re
import types

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.sinks.trackers import MlflowSink, WandbSink
from tests.support.reports import build_report
from tests.support.trackers import WandbRun, install
from tests.support.warnings import warnings_of


def train(**options):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    options = {"likelihood": "categorical", "tensorboard": False, "on_error": "raise"} | options
    with fimprobe.attach(net, **options) as probe:
        for _ in range(3):
            probe.step(torch.randn(8, 3))
    return probe.history


@pytest.mark.parametrize("active", [False, True])
def test_wandb_gets_every_number_of_the_model_at_its_step(monkeypatch, active):
    runs = []

    def init(**options):
        runs.append(WandbRun(**options))
        return runs[-1]

    module = install(monkeypatch, "wandb", run=None, init=init)
    if active:  # the run of the user, or of a Trainer
        module.run = WandbRun()
        runs.append(module.run)
    reports = train(wandb=True)
    (run,) = runs
    assert [row.pop("fim_probe/step") for row in run.rows] == [r.step for r in reports]
    assert run.rows == [r.scalars(layers=()) for r in reports]
    for name in run.rows[0]:
        assert any(name.startswith(glob.rstrip("*")) for glob in run.axes if glob.endswith("*")), name
    assert run.finished == (not active)
    if not active:
        assert run.options["config"]["model"] == "Linear"


@pytest.mark.parametrize("active", [False, True])
def test_mlflow_gets_every_number_of_the_model_at_its_step(monkeypatch, active):
    rows, calls = {}, []
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="7"))
    state = {"active": run if active else None}

    def start_run():
        state["active"] = run
        return run

    def log_metrics(values, step, run_id):
        assert run_id == "7"
        for name, value in values.items():
            assert re.fullmatch(r"[/\w.\- ]*", name) and type(value) is float
        rows[step] = values

    install(
        monkeypatch, "mlflow", active_run=lambda: state["active"], start_run=start_run,
        log_metrics=log_metrics, set_tags=lambda tags: calls.append(tags),
        end_run=lambda: calls.append("end"),
    )  # fmt: skip
    reports = train(mlflow=True)
    assert rows == {r.step: r.scalars(layers=()) for r in reports}
    assert calls[-1:] == ([] if active else ["end"])
    if not active:
        assert calls[0]["fimprobe.model"] == "Linear"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_once(monkeypatch, caplog, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert len(train(on_error="warn", **{name: True})) == 3
    (line,) = warnings_of(caplog)
    assert f"pip install {name}" in line and f"{name}: true has no effect" in line


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    sink = WandbSink(run=lambda: {"model": "Linear"})
    for step in (0, 10):
        sink.write(build_report(3, step))
    assert wandb.run is not None and wandb.run.config["model"] == "Linear"
    summary = dict(wandb.run.summary)
    last = build_report(3, 10).scalars(layers=())
    assert summary["fim_probe/step"] == 10 and summary.items() >= last.items()
    sink.close()
    assert wandb.run is None and list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("probed")
    sink = MlflowSink(run=lambda: {"model": "Linear"})
    reports = [build_report(3, step) for step in (0, 10)]
    for report in reports:
        sink.write(report)
    sink.close()
    assert mlflow.active_run() is None
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.tags["fimprobe.model"] == "Linear"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "fim/i1/trace")
    assert [(m.step, m.value) for m in history] == [(r.step, r.total.i1.trace) for r in reports]
