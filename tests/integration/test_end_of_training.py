"""How a training ends: one closing paragraph, whole files, and why probing ended or never began."""

import json
import logging
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.cli.commands import main
from fimprobe.report.format import percent
from fimprobe.sinks.jsonl import JsonlSink
from tests.models.small import mlp
from tests.support.loop import KNOWN, data, sgd, train
from tests.support.paths import ROOT
from tests.support.warnings import warnings_of


def closing_lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fimprobe: ")]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "fimprobe.jsonl").read_text().splitlines()]


def test_the_closing_paragraph_states_reports_verdict_and_time(capsys, caplog):
    net = mlp()
    with caplog.at_level(logging.INFO, "fimprobe"):
        probe = fimprobe.attach(net, KNOWN, schedule={"every": 2})
        train(net, 5)
        probe.detach()
        probe.detach()
    (line,) = closing_lines(capsys)
    assert line.startswith("fimprobe: 3 reports in 5 steps, the last at step 4. ")
    assert probe.last.advice[0] in line and " The probe took " in line
    assert caplog.messages.count(line) == 1


def test_it_is_written_once_where_the_log_goes_to_the_terminal(capsys):
    logger, handler = logging.getLogger("fimprobe"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        net = mlp()
        with fimprobe.attach(net, KNOWN):
            train(net, 1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len([x for x in closing_lines(capsys) if "1 report in 1 step," in x]) == 1


def test_nothing_is_stated_where_nothing_happened(capsys, caplog):
    with fimprobe.attach(mlp(), KNOWN):
        pass
    assert not closing_lines(capsys) and not caplog.records


@pytest.mark.parametrize(
    ("options", "steps", "reason"),
    [
        ({"schedule": {"at": [99]}}, 4, "the schedule names none of the steps 0 to 3. Use"),
        ({"schedule": {"budget": 0.5}}, 1, "a budget begins at the second"),
    ],
)
def test_a_schedule_that_was_never_due(options, steps, reason, capsys, caplog, tmp_path):
    net = mlp()
    options = {**KNOWN, "tensorboard": {}, **options}
    with fimprobe.attach(net, options, log_dir=tmp_path):
        train(net, steps)
    (line,) = closing_lines(capsys)
    assert line.startswith(f"fimprobe: no report in {steps} step") and reason in line
    assert not warnings_of(caplog)  # it is as requested
    events = EventAccumulator(str(tmp_path)).Reload()
    (page,) = events.Tensors("fimprobe/ended")
    assert reason in page.tensor_proto.string_val[0].decode() and page.step == steps
    (end,) = lines_of(tmp_path)
    assert end["end"]["step"] == steps and reason in end["end"]["reason"]


def test_what_previews_leave_out_is_stated_with_the_setting_that_measures_it(capsys):
    net = mlp()
    with fimprobe.attach(net, likelihood="categorical", tensorboard=False) as probe:
        train(net, 1)
        probe.schedule.free, probe.schedule.spent = 5.0, 50.0  # as if the allowance were used
        train(net, 1)
    (line,) = closing_lines(capsys)
    assert probe.last.total.i2 is None and "1 report in 2 steps, the last at step 1" in line
    assert "5 s of early reports, which have 5 s of their own; all others may take 2 % of the" in line
    assert "Not measured: Î₂ and the bounds" in line and "Pass schedule={'every': 100}" in line


def test_a_single_report_under_a_budget_is_explained(capsys):
    net = mlp()
    with fimprobe.attach(net, likelihood="categorical", tensorboard=False) as probe:
        train(net, 2)
        probe.schedule.free = 5.0
        probe.schedule.spent += 1000.0  # as if the first report had taken so long
        train(net, 10, first=2)
    (line,) = closing_lines(capsys)
    assert len(probe.history) == 1 and "1 report in 12 steps" in line
    assert "A second report did not fit into the time budget: pass schedule={'every': 100}" in line
    assert "fimprobe show" not in line  # there is no file


def test_the_end_names_the_command_that_shows_the_run(capsys, tmp_path):
    net, folder = mlp(), tmp_path / "a run"
    with fimprobe.attach(net, KNOWN, tensorboard={}, log_dir=folder):
        train(net, 2)
    (line,) = closing_lines(capsys)
    command = line.partition("To read them: fimprobe ")[2]
    assert main(shlex.split(command)) == 0
    assert "trace F: Î₁" in capsys.readouterr().out


def test_an_error_that_takes_more_inputs_names_the_function(capsys):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    with fimprobe.attach(net, KNOWN) as probe:
        known = probe.step(torch.randn(32, 4))
        with torch.no_grad():
            net.weight.mul_(400)  # it is sure of nearly all labels
        probe.step(torch.randn(32, 4))
    (line,) = closing_lines(capsys)
    assert f"Last known, step {known.step}: {percent(known.total.i1.rel_error)}, an error of" in line
    assert "take more inputs. `batch` is 32: 128 measures more, of a training batch that has" in line
    assert probe.last.total.i1.rel_error is None
    assert "measure more inputs than the 32 of a report: fimprobe.measure(model, inputs," in line


def test_why_probing_never_began_is_in_the_file_and_shown(capsys, tmp_path):
    net = mlp()
    with fimprobe.attach(net, schedule={"every": 1}, log_dir=tmp_path):
        x, y = data()
        log_p = F.log_softmax(net(x), 1).gather(1, y[:, None])
        (-((1 - log_p.exp()) ** 2) * log_p).mean().backward()  # focal loss
        sgd(net).step()
    (line,) = closing_lines(capsys)
    assert "no report in 1 step: probing ended at step 0" in line
    with pytest.raises(fimprobe.FimprobeError, match="without one: probing ended at step 0"):
        fimprobe.read(tmp_path)
    assert main(["show", str(tmp_path)]) != 0
    shown = capsys.readouterr()
    assert "probing ended at step 0" in shown.out + shown.err
    assert "again later" not in shown.out + shown.err


def test_why_probing_ended_stands_below_the_reports_until_it_resumes(capsys, tmp_path, monkeypatch):
    net, options = mlp(), {**KNOWN, "on_error": "warn"}
    with fimprobe.attach(net, options, log_dir=tmp_path) as probe:
        train(net, 2)
        monkeypatch.setattr(probe._cycle.measurement, "measure", lambda *args, **kwargs: 1 / 0)
        train(net, 3, first=2)
    (line,) = closing_lines(capsys)
    reason = "probing ended at step 2, training continues: ZeroDivisionError: division by zero"
    assert "2 reports in 5 steps" in line and f" P{reason[1:]}. " in line
    records = fimprobe.read(tmp_path)
    assert records.end == reason and len(records.reports) == 2 and not records.notes
    assert lines_of(tmp_path)[-1] == {"end": {"step": 5, "reason": reason}}
    assert main(["show", str(tmp_path)]) == 0
    assert f"The probe ended early: {reason}" in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert f"The probe ended early:</b> {reason}" in (tmp_path / "page.html").read_text()
    with fimprobe.attach(net, options, log_dir=tmp_path, first_step=5):
        train(net, 1, first=5)
    records = fimprobe.read(tmp_path)
    assert records.end == "" and [r["step"] for r in records.reports] == [0, 1, 5]


def test_a_training_that_never_began_resumes_into_its_file(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    for _ in range(2):
        sink = JsonlSink(path)
        sink.write_end("nothing was measured", 4)
        sink.close()
    JsonlSink(path, purge_step=9).close()
    assert path.read_text().count("nothing was measured") == 2
    JsonlSink(path, purge_step=4).close()
    assert path.read_text() == ""


SCRIPT = """
import sys, torch, fimprobe
from tests.models.small import mlp
from tests.support.loop import KNOWN, backward, sgd
net = mlp()
optimizer = sgd(net)
probe = fimprobe.attach(net, {**KNOWN, "tensorboard": {}}, log_dir=sys.argv[1])
for step in range(3):
    backward(net, step)
    optimizer.step()
raise KeyboardInterrupt
"""


def test_files_are_whole_when_an_interrupt_ends_the_interpreter(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and "KeyboardInterrupt" in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("fimprobe: 3 reports in 3 steps"), run.stderr
    assert [r["step"] for r in fimprobe.read(tmp_path).reports] == [0, 1, 2]
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"]


def test_a_cell_that_runs_twice_replaces_its_probe(tmp_path, caplog):
    net = mlp()
    for _ in range(2):
        probe = fimprobe.attach(net, KNOWN, log_dir=tmp_path)
        train(net, 2)
    assert len(probe.history) == 2 and not probe.detached
    (warning,) = warnings_of(caplog)
    assert "the model had a probe, which was detached" in warning
    assert fimprobe.detach(net) is probe and probe.detached and fimprobe.detach(net) is None
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_an_estimator_that_another_option_switches_off_is_stated(caplog):
    options = {**KNOWN, "estimators": ["i1", "i2"], "second_order": "off", "on_error": "warn"}
    net = mlp()
    with fimprobe.attach(net, options):
        train(net, 2)
    (warning,) = warnings_of(caplog)
    assert "`estimators` names 'i2', which second_order='off' leaves out" in warning


def test_a_batch_above_the_training_batch_is_stated_once(capsys, caplog):
    net = mlp()
    with fimprobe.attach(net, {**KNOWN, "batch": 64}):
        train(net, 3)
    stated = [line for line in closing_lines(capsys) if "`batch` is 64" in line]
    assert len(stated) == 1 and "the training batch has 12 inputs" in stated[0]
    assert not warnings_of(caplog)


def test_given_inputs_have_no_empirical_fisher(caplog):
    net = mlp()
    with fimprobe.attach(net, {**KNOWN, "estimators": ["empirical"]}) as probe:
        for _ in range(2):
            assert probe.step(data()[0]).total.empirical is None
    (warning,) = warnings_of(caplog)
    assert "no empirical Fisher is measured for inputs given" in warning


def test_a_folder_without_charts_holds_the_lines(tmp_path):
    net = mlp()
    with fimprobe.attach(net, KNOWN, tensorboard=False, log_dir=tmp_path) as probe:
        train(net, 1)
    assert probe.log_dir is None and [p.name for p in tmp_path.glob("*.jsonl")] == ["fimprobe.jsonl"]
    assert len(fimprobe.read(tmp_path).reports) == 1
    options = {**KNOWN, "tensorboard": {"figures": False}}
    with fimprobe.attach(net, options, log_dir=tmp_path / "charts") as probe:
        assert probe.config.tensorboard.figures is False
        assert probe.log_dir == tmp_path / "charts"


def test_a_loss_decides_the_family_and_what_it_takes_is_stated(caplog):
    net, loss = mlp(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    options = {key: value for key, value in KNOWN.items() if key != "likelihood"}
    with fimprobe.attach(net, options, loss=loss) as probe:
        train(net, 1)
    assert probe.likelihood.name == "categorical" and probe.decision in caplog.text
    assert probe.decision.startswith("loss=CrossEntropyLoss: labels are classes")
    with pytest.raises(fimprobe.FimprobeError, match="^`loss` must be left out where"):
        fimprobe.attach(net, KNOWN, loss=loss)
    with pytest.raises(fimprobe.FimprobeError, match="^`loss` must be one of"):
        fimprobe.attach(net, options, loss="mse")
    with fimprobe.attach(net, {**options, "on_error": "warn"}, loss=torch.nn.MSELoss()) as probe:
        train(net, 1)  # by cross-entropy
    assert not probe.history and "MSELoss, but the gradient at the model's outputs" in caplog.text
