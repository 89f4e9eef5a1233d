"""What is written is what was measured, read back with the tools that users have."""

import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.cli.commands import main


@pytest.fixture
def run(tmp_path):
    """A run of 40 steps probed every 10."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    log_dir = tmp_path / "run"
    with fimprobe.attach(net, log_dir=log_dir, schedule={"every": 10}, draws=2) as probe:
        for _ in range(40):
            optimizer.zero_grad()
            x, y = torch.randn(32, 6), torch.randint(3, (32,))
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return log_dir, probe


def test_tensorboard_reads_every_scalar(run):
    log_dir, probe = run
    events = EventAccumulator(str(log_dir / "i1"))
    events.Reload()
    traces = events.Scalars("fim/log10_trace")
    assert [e.step for e in traces] == [r.step for r in probe.history] == [0, 10, 20, 30]
    for event, report in zip(traces, probe.history, strict=True):
        assert 10**event.value == pytest.approx(report.total.i1.trace, rel=1e-5)
    events = EventAccumulator(str(log_dir))
    events.Reload()
    about = events.Tensors("fimprobe/about")[0].tensor_proto.string_val[0].decode()
    assert "0.weight" in about
    assert "categorical" in about


def test_jsonl_is_strict_json_and_complete(run):
    log_dir, probe = run
    lines = (log_dir / "fimprobe.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == [r.to_dict() for r in probe.history]
    assert json.loads(lines[1])["parameters"]["0.weight"]["i1"]["label_variance"] > 0


def test_every_report_is_on_disk_as_soon_as_it_is_made(tmp_path):
    options = {"likelihood": "categorical", "estimators": ("i1",), "bounds": False}
    net = nn.Linear(3, 2)
    with fimprobe.attach(net, log_dir=tmp_path, **options) as probe:
        for step in range(3):
            report = probe.step(torch.randn(4, 3))
            rows = fimprobe.read(tmp_path)
            assert rows.reports[-1] == report.to_dict() and len(rows.reports) == step + 1
            assert rows.notes == [] and rows.run["first_step"] == 0


def test_a_torn_last_line_is_left_out(run):
    log_dir, _ = run
    path = log_dir / "fimprobe.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(fimprobe.read(log_dir).reports) == 3


def test_show_prints_table_and_trend(run, capsys):
    assert main(["show", str(run[0])]) == 0
    out = capsys.readouterr().out
    assert "pairs for 10 %" in out
    assert out.count("step 30") == 1
    assert re.search(r"^ +0  ", out, re.MULTILINE)


def test_show_and_check_explain_mistakes(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 1
    assert "must be a directory with a fimprobe.jsonl" in capsys.readouterr().err
    path = tmp_path / "f.yaml"
    path.write_text("drows: 2\n")
    assert main(["check", str(path)]) == 1
    assert "Did you mean 'draws'" in capsys.readouterr().err
    path.write_text("draws: 2\n")
    assert main(["check", str(path)]) == 0


def test_layers_are_chosen_by_pattern_and_number(tmp_path):
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    layers = {"include": ["[0-3]"], "exclude": ["2"], "top": 2}
    options = {"likelihood": "categorical", "estimators": ("i1",), "bounds": False}
    with fimprobe.attach(net, log_dir=tmp_path, layers=layers, **options) as probe:
        probe.step(torch.randn(8, 4))
    events = EventAccumulator(str(tmp_path / "i1"))
    events.Reload()
    shown = {t.split("/")[1] for t in events.Tags()["scalars"] if t.startswith("fim_layer_")}
    assert len(shown) == 2
    assert shown <= {"0 Linear", "1 Linear", "3 Linear"}


def test_a_sink_of_ones_own_and_one_that_fails(caplog):
    class Mine:
        def __init__(self):
            self.seen = []

        def write(self, report):
            self.seen.append(report.step)

        def close(self):
            self.seen.append("closed")

    class Broken(Mine):
        def write(self, report):
            raise OSError("disk full")

    mine, net = Mine(), nn.Linear(3, 2)
    options = {"likelihood": "categorical", "tensorboard": False, "estimators": ("i1",)}
    with fimprobe.attach(net, sinks=[Broken(), mine], **options) as probe:
        for _ in range(3):
            probe.step(torch.randn(4, 3))
    assert mine.seen == [0, 1, 2, "closed"]
    assert len([r for r in caplog.records if "disk full" in r.message]) == 1
