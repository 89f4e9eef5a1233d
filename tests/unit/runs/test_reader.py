"""What a run wrote is read back as it was measured; damaged, foreign and missing files are told."""

import dataclasses
import json
import platform
import re
import sys
import time
from datetime import datetime

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.cli.commands import main
from fimprobe.report.table import format_report, make_rows
from fimprobe.runs.reader import latest_training
from tests.models.small import mlp
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, write_run(folder, lambda: mlp(4, 3, 2), estimators=["i1", "i2", "ih"])


def test_every_row_holds_what_was_measured(run):
    rows = fimprobe.read(run[0])
    reports = {r.step: r for r in run[1].history}
    expected = 0
    for report in reports.values():
        groups = [report.total, *report.layers.values(), *report.parameters.values()]
        kinds = ("i1", "i2", "ih", "empirical", "activation", "geometry")
        expected += sum(getattr(g, kind) is not None for g in groups for kind in kinds)
    assert len(rows) == expected
    assert len({(r["step"], r["group"], r["name"], r["estimator"]) for r in rows}) == expected
    for row in rows:
        report = reports[row["step"]]
        places = {"total": {"total": report.total}, "layer": report.layers}
        group = (places | {"parameter": report.parameters})[row["group"]][row["name"]]
        estimate = getattr(group, row["estimator"])
        assert row["numel"] == group.numel
        for field in dataclasses.fields(estimate):
            if not field.name.startswith("diagonal_") and field.name not in (
                "diagonal",
                "trace_range",
                "pair_variance",
            ):
                assert row[field.name] == getattr(estimate, field.name), (row, field.name)
        if row["estimator"] != "geometry":
            assert row["pairs_for_10_percent"] == estimate.pairs_for(0.1)
            assert row["pairs_error"] == estimate.pairs_error
            assert row["one_label_error"] == estimate.error_of(inputs=report.batch_size, labels=1)
            assert "pair_variance" not in row
            unknown = {"pairs_for_10_percent" if n == "pairs" else n for n in row["unknown"]}
            assert all(row[name] is None for name in unknown)
    assert {r["group"] for r in rows} == {"total", "layer", "parameter"}
    assert rows.notes == []


def test_a_folder_further_out_and_the_file_are_the_run(run, tmp_path):
    inner = tmp_path / "output" / "runs" / "Nov_host" / "fimprobe"
    inner.mkdir(parents=True)
    (inner / "fimprobe.jsonl").write_bytes((run[0] / "fimprobe.jsonl").read_bytes())
    expected = fimprobe.read(run[0])
    for place in (inner, inner.parent, tmp_path / "output", str(inner / "fimprobe.jsonl")):
        assert fimprobe.read(place) == expected
    other = tmp_path / "output" / "runs" / "Dec_host" / "fimprobe"
    other.mkdir(parents=True)
    (other / "fimprobe.jsonl").write_bytes((run[0] / "fimprobe.jsonl").read_bytes())
    with pytest.raises(fimprobe.FimprobeError, match="which has 2 runs") as error:
        fimprobe.read(tmp_path)
    assert str(inner) in str(error.value)
    assert str(other) in str(error.value)


def test_a_torn_last_line_is_left_out_and_told(run, tmp_path, caplog):
    about, *lines = (run[0] / "fimprobe.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "fimprobe.jsonl"
    for kept in (5, 200, len(lines[2]) - 2):
        caplog.clear()
        path.write_text("".join(lines[:2]) + lines[2][:kept])
        rows = fimprobe.read(tmp_path)
        assert [r["step"] for r in rows.reports] == [0, 1]
        assert "line 3 is torn (a crash, or still being written)" in caplog.text
        assert len(rows.notes) == 1
    path.write_text(lines[0] + lines[1][:100] + "\n" + lines[2])  # a line torn, then a new training
    assert [r["step"] for r in fimprobe.read(path).reports] == [0, 2]
    assert "line 2 is damaged" in caplog.text
    path.write_text("".join(lines[:2]) + about[:60])
    assert [r["step"] for r in fimprobe.read(path).reports] == [0, 1]
    path.write_text(lines[2].rstrip("\n"))  # only the end of the line is missing
    assert len(fimprobe.read(path).reports) == 1


def test_two_trainings_in_one_file_are_told(run, tmp_path, caplog):
    text = (run[0] / "fimprobe.jsonl").read_text()
    again = text.splitlines()[:2]
    (tmp_path / "fimprobe.jsonl").write_text("\n".join([text.rstrip("\n"), *again]) + "\n")
    rows = fimprobe.read(tmp_path)
    assert [r["step"] for r in rows.reports] == [0, 1, 2, 0]
    assert "steps go back from 2 to 0 at line 6" in caplog.text
    assert [r["step"] for r in latest_training(rows.reports)] == [0]
    assert latest_training(rows.reports[:3]) == rows.reports[:3]


def test_missing_empty_and_foreign_files(tmp_path):
    def told(place):
        with pytest.raises(fimprobe.FimprobeError) as error:
            fimprobe.read(place)
        return str(error.value)

    assert "does not exist" in told(tmp_path / "nowhere")
    assert "a directory with a fimprobe.jsonl, got" in told(tmp_path)
    path = tmp_path / "fimprobe.jsonl"
    path.write_text("")
    assert "the file is empty" in told(tmp_path)
    path.write_text('{"step": 0, "batch')
    assert "line 1 is torn" in told(tmp_path)
    foreign = ["loss,step\n1,2\n", '{"loss": 1}\n', "[1, 2]\n", "12\n"]
    for text in foreign:
        path.write_text(text)
        assert "whose line 1 is not a report" in told(path), text
    path.write_bytes(bytes(range(128, 256)))
    assert "must be a file that fimprobe wrote" in told(path)


def test_the_record_starts_with_what_was_measured_and_how(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    options = {"likelihood": fimprobe.likelihoods.Gaussian(sigma=0.5), "draws": 3, "seed": 7}
    with fimprobe.attach(net, log_dir=tmp_path, **options) as probe:
        for _ in range(2):
            probe.step(torch.randn(8, 4))
    first, *_ = (tmp_path / "fimprobe.jsonl").read_text().splitlines()
    rows = fimprobe.read(tmp_path)
    assert rows.runs == [json.loads(first)["run"]] and rows.run == rows.runs[0]
    known = {
        "first_step": 0, "fimprobe": fimprobe.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "model": "Sequential", "dtype": "float32",
        "parameters": 29, "trainable": 17, "device": "cpu", "processes": 1,
        "likelihood": "Gaussian(sigma=0.5)", "decision": "given",
    }  # fmt: skip
    assert {name: rows.run[name] for name in known} == known
    assert set(rows.run) == {*known, "began", "config"}
    assert abs(datetime.fromisoformat(rows.run["began"]).timestamp() - time.time()) < 60
    config = rows.run["config"]
    assert set(config) == set(fimprobe.Config.model_fields)
    assert (config["draws"], config["seed"], config["batch"]) == (3, 7, 32)
    assert config["schedule"]["budget"] == 0.02 and config["tensorboard"]["log_dir"] == str(tmp_path)


def test_the_decision_is_that_of_the_first_report(tmp_path):
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with fimprobe.attach(net, log_dir=tmp_path, schedule={"every": 1}) as probe:
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    run = fimprobe.read(tmp_path).run
    assert run["likelihood"] == "Categorical(class_dim=-1)"
    assert run["decision"] == probe.decision == "the loss gradient is that of cross-entropy"


def test_files_without_that_line_are_read(run, tmp_path):
    lines = (run[0] / "fimprobe.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fimprobe.jsonl").write_text("".join(lines[1:]))
    rows = fimprobe.read(tmp_path)
    assert rows == fimprobe.read(run[0]) and rows.notes == []
    assert rows.run == {} and rows.runs == []


def old(thing):
    """A record as version 0.1.0 wrote it before errors were told apart."""
    if not isinstance(thing, dict):
        return thing
    gone = ("label_sampling", "seen_mass", "outputs", "convergence", "unknown", "pairs_error")
    gone += ("one_label_error", "effective_inputs", "skewness", "label_variance_error")
    gone += ("total_label_variance_error", "total_variance")
    names = {"pairs_for_10_percent": "draws_for_10_percent"}
    return {names.get(key, key): old(value) for key, value in thing.items() if key not in gone}


@pytest.mark.parametrize("draws", [2, "exact"])
def test_files_of_older_versions_are_read_shown_and_compared(tmp_path, capsys, draws):
    """Their numbers stand where the new ones do; what they lack is a dash or left out."""
    new, before = tmp_path / "new", tmp_path / "before"
    write_run(new, lambda: mlp(4, 3, 2), draws=draws)
    lines = (new / "fimprobe.jsonl").read_text().splitlines()
    before.mkdir()
    text = "\n".join([lines[0], *(json.dumps(old(json.loads(line))) for line in lines[1:])])
    (before / "fimprobe.jsonl").write_text(text + "\n")
    rows, expected = fimprobe.read(before), fimprobe.read(new)
    assert rows.notes == [] and rows.run == expected.run and len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert (
            row.items() <= {**want, "draws_for_10_percent": want.get("pairs_for_10_percent")}.items()
        )
    sampling = "exact labels" if draws == "exact" else "2 labels from the model for each input"
    for record, want in zip(rows.reports, expected.reports, strict=True):
        assert sampling in format_report(record)
        assert make_rows(record)[1:] == make_rows(want)[1:]
        variances = (make_rows(one, view="variances")[1:] for one in (record, want))
        for row, wanted in zip(*variances, strict=True):
            assert row[1:3] == wanted[1:3]
            assert row[3].partition(" ")[0][:1] == wanted[3][:1]  # without its error: all digits
    for arguments in ([before], [before, new], [new, before]):
        assert main(["show", *map(str, arguments)]) == 0
    titles = []
    for run in (before, new):
        assert main(["show", str(run), "--html", str(run / "x.html")]) == 0
        titles.append(
            re.findall(r'<svg role="img" aria-label="([^"]*)"', (run / "x.html").read_text())
        )
    lost = [x for x in titles[1] if not x.startswith("Error of the trace alone")]
    assert titles[0] == lost and len(titles[0]) >= 6
    told = capsys.readouterr().out
    assert ("label sampling differs: A model, B size_biased" in told) == (draws == 2)
    page = (before / "x.html").read_text()
    assert "Layers over the training" in page
    assert not re.search(r"\b(None|nan|inf)\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))


def test_a_training_that_resumes_tells_itself_again(tmp_path):
    path = str(tmp_path / "fimprobe.jsonl")
    options = {"likelihood": "categorical", "tensorboard": False, "jsonl": path, "estimators": ["i1"]}
    for start, steps, draws in ((0, 6, 2), (4, 3, 3), (5, 2, 5)):
        net = nn.Linear(4, 3)
        with fimprobe.attach(net, first_step=start, draws=draws, **options) as probe:
            for _ in range(steps):
                probe.step(torch.randn(8, 4))
    rows = fimprobe.read(path)
    assert [(r["step"], r["draws"]) for r in rows.reports] == [
        (0, 2), (1, 2), (2, 2), (3, 2), (4, 3), (5, 5), (6, 5),
    ]  # fmt: skip
    assert [(r["first_step"], r["config"]["draws"]) for r in rows.runs] == [(0, 2), (4, 3), (5, 5)]
    assert rows.run["config"]["draws"] == 5 and rows.notes == []
    with fimprobe.attach(net, first_step=4, draws=7, **options) as probe:
        probe.step(torch.randn(8, 4))
    runs = fimprobe.read(path).runs  # those of which no report is left go with them
    assert [(r["first_step"], r["config"]["draws"]) for r in runs] == [(0, 2), (4, 7)]


def test_a_frame_where_pandas_is_installed(run):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows = fimprobe.read(run[0])
    frame = rows.frame()
    assert isinstance(frame, pandas.DataFrame)
    picked = frame.query("group == 'layer' and name == '2' and estimator == 'i2'")
    expected = [r.layers["2"].i2.label_variance for r in run[1].history]
    assert picked["label_variance"].tolist() == expected


def test_without_pandas_the_remedy_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(fimprobe.FimprobeError, match="pip install pandas"):
        fimprobe.read(run[0]).frame()
