"""``fimprobe show``: the numbers printed are those of the reports; two runs, mistakes, terminals."""

import io
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.cli import main
from fimprobe.table import count, make_comparison, make_rows, make_trends, number, percent, sparkline


def train(folder, *, layers=2, reports=3, seed=0, scale=1.1, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    options = {"draws": 2, "tensorboard": False, "jsonl": str(folder / "fimprobe.jsonl")} | options
    with fimprobe.attach(net, **({"likelihood": "categorical"} | options)) as probe:
        for _ in range(reports):
            probe.step(torch.randn(8, 4))
            with torch.no_grad():
                net[0].weight *= scale
    return probe.history


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two layers, and one of 30."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b", "many")]
    found = [
        train(folders[0]),
        train(folders[1], reports=4, draws=3, batch=4, estimators=["i1"], scale=1.3),
        train(folders[2], layers=30, reports=1, bounds=False),
    ]
    return list(zip(map(str, folders), found, strict=True))


def test_table_and_trends_hold_the_reports_values(runs, capsys):
    folder, reports = runs[0]
    assert main(["show", folder]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    last = reports[-1]
    table = out.split("\n\n")[0]
    for name, group in {**last.layers, "total": last.total}.items():
        row = next(x for x in table.splitlines() if x.startswith(name + " "))
        for value in (number(group.i1.trace), percent(group.i1.rel_error)):
            assert re.search(rf"(?<!\S){re.escape(value)}(?!\S)", row), (value, row)
        assert percent(group.i2.rel_error) in row
    for sentence in last.advice:
        assert sentence in out
    trend = lines["total"]  # the last line that starts so: the trends'
    for value in (reports[0].total.i1.trace, last.total.i1.trace):
        assert number(value) in trend
    assert "\x1b" not in out  # no colours where nobody looks


def test_trends_are_the_series(runs):
    reports = [r.to_dict() for r in runs[0][1]]
    rows = make_trends(reports)
    assert [row[0] for row in rows] == ["layer", "total", "0", "1"]
    series = [r.layers["0"].i1.label_variance for r in runs[0][1]]
    assert rows[2][3].split() == [number(series[0]), sparkline(series), number(series[-1])]


def test_with_exact_labels_both_errors_stand_in_the_table(tmp_path, capsys):
    (*_, last) = train(tmp_path, layers=2, draws="exact")
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row for row in make_rows(last.to_dict())}
    assert rows["layer"][4:7] == ("rel. error", "Î₁: 1 label", "Î₂: 1 label")
    for name, group in {**last.layers, "total": last.total}.items():
        want = [percent(group.i1.rel_error)]
        for e in (group.i1, group.i2):
            pair = e.label_variance + e.input_variance
            want.append(percent((pair / last.batch_size) ** 0.5 / e.norm))
        assert list(rows[name][4:7]) == want
        for value in want:
            assert re.search(rf"(?<!\S){re.escape(value)}(?!\S)", out)
    assert f"off by {rows['total'][4]} at 8 inputs with labels integrated over" in out
    assert f"it is off by {rows['total'][5]} (Î₁) and {rows['total'][6]} (Î₂)" in out
    assert "1 label: of an estimator with one drawn label for each" in out


def test_show_tells_how_it_was_measured(runs, tmp_path, capsys):
    folder, _ = runs[1]
    assert main(["show", folder]) == 0
    out = capsys.readouterr().out
    assert "Model:       Sequential, 40 trainable parameters (float32)\n" in out
    assert "Likelihood:  Categorical(class_dim=-1) (given)\n" in out
    assert "Settings:    estimators [i1], draws 3, batch 4\n" in out
    assert f"Measured by: fimprobe {fimprobe.__version__}, torch {torch.__version__}, Python" in out
    lines = (Path(folder) / "fimprobe.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fimprobe.jsonl").write_text("".join(lines[1:]))  # of before that was written
    assert main(["show", str(tmp_path)]) == 0
    assert capsys.readouterr().out == out[: out.index("\nModel: ")]
    assert main(["show", str(tmp_path), folder]) == 0


def test_two_runs_tell_what_was_set_differently(runs, capsys):
    assert main(["show", runs[0][0], runs[1][0]]) == 0
    told = [
        x[22:] for x in capsys.readouterr().out.splitlines() if x.startswith("Measured differently")
    ]
    assert told == ["estimators: A [i1, i2], B [i1]", "draws: A 2, B 3", "batch: A 32, B 4"]
    assert main(["show", runs[0][0], runs[0][0]]) == 0
    assert "differ" not in capsys.readouterr().out


def test_a_folder_of_several_runs_is_listed(tmp_path, capsys):
    folder = tmp_path / "my runs"
    last = {name: train(folder / name)[-1] for name in ("a", "b")}
    os.utime(folder / "a" / "fimprobe.jsonl", (1e9, 1e9))
    (folder / "c").mkdir()
    (folder / "c" / "fimprobe.jsonl").write_text("")
    os.utime(folder / "c" / "fimprobe.jsonl", (0, 0))
    assert main(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{folder} holds 3 runs, newest first:" in out
    places = [out.index(f"{folder / name} ") for name in ("b", "a", "c")]
    assert places == sorted(places)
    for name in ("a", "b"):
        (row,) = (x for x in out.splitlines() if x.startswith(f"{folder / name} "))
        assert row.split(str(folder / name))[1].split()[:2] == ["3", "2"]
        assert f"  {percent(last[name].total.i1.rel_error)}  " in row
    (told,) = (x for x in out.splitlines() if x.startswith("Two side by side: fimprobe "))
    assert main(shlex.split(told)[5:]) == 0  # what it says can be run
    assert main(["show", str(folder), "--html", str(tmp_path / "x.html")]) == 1
    assert "holds 3 runs; pass one" in capsys.readouterr().err
    for name in ("b", "c"):
        shutil.rmtree(folder / name)
    assert main(["show", str(folder)]) == 0  # the only one is shown
    assert "pairs for 10 %" in capsys.readouterr().out


def test_sparklines_follow_the_values():
    bars = sparkline([10.0**i for i in range(8)])
    assert bars == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 2, 1, None, -1]) == "▁█▁ ▁"
    long = sparkline([1.5**i for i in range(100)])
    assert len(long) == 16
    assert list(long) == sorted(long)
    assert sparkline([]) == ""


def test_the_neediest_layers_are_shown_and_the_rest_is_counted(runs, capsys):
    folder, reports = runs[2]
    assert main(["show", folder, "--top", "3"]) == 0
    out = capsys.readouterr().out
    need = sorted(reports[0].layers, key=lambda n: -reports[0].layers[n].i1.draws_for(0.1))
    rows = [row[0] for row in make_rows(reports[0].to_dict(), top=3)]
    assert rows == ["layer", *need[:3], "total"]
    assert "(27 layers that need fewer pairs are not shown: --top 30)" in out
    assert main(["show", folder, "--top", "0"]) == 1


def test_two_runs_side_by_side(runs, capsys):
    (a, one), (b, two) = runs[:2]
    assert main(["show", a, b]) == 0
    out = capsys.readouterr().out
    rows = {r[0]: r for r in make_comparison(one[-1].to_dict(), two[-1].to_dict())}
    for name in ("0", "1", "total"):
        x, y = ((r.layers | {"total": r.total})[name].i1 for r in (one[-1], two[-1]))
        assert rows[name][1:3] == (number(x.trace), number(y.trace))
        assert float(rows[name][3].rstrip("×").replace(",", "")) == pytest.approx(
            y.trace / x.trace, rel=0.06, abs=0
        )
        assert rows[name][4:6] == (percent(x.rel_error), percent(y.rel_error))
    told = [line for line in out.splitlines() if line.startswith("Careful: ")]
    for difference in ("draws differ: A 2, B 3", "inputs differ: A 8, B 4"):
        assert any(difference in line for line in told)
    assert any("estimators differ: A i1, i2, B i1" in line for line in told)
    assert any("step differs: A 2, B 3" in line for line in told)
    assert "likelihood" not in "".join(told)
    assert "A: Î₁ from step 0 to 2" in out
    assert "B: Î₁ from step 0 to 3" in out


def test_equal_configurations_are_not_warned_of(runs, capsys):
    assert main(["show", runs[0][0], runs[0][0]]) == 0
    out = capsys.readouterr().out
    assert "Careful" not in out
    assert "1×" in out


def test_layers_and_likelihoods_that_differ(runs, tmp_path, capsys):
    train(tmp_path, layers=3, reports=3, likelihood="gaussian")
    assert main(["show", runs[0][0], str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "likelihood differs: A categorical, B gaussian" in out
    assert "layers differ: only in A –; only in B 2" in out


def test_mistakes_are_told(runs, tmp_path, capsys):
    for arguments, told in (
        ([runs[0][0]] * 3, "3 runs are too many"),
        ([runs[0][0]] * 2 + ["--html", str(tmp_path / "x.html")], "takes one run"),
        ([runs[0][0], "--html", str(tmp_path / "no" / "x.html")], "cannot be written"),
        ([str(tmp_path)], "holds no fimprobe.jsonl"),
    ):
        assert main(["show", *arguments]) == 1
        assert told in capsys.readouterr().err


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_in_a_terminal_numbers_stay_whole(runs, monkeypatch, columns):
    pytest.importorskip("rich", reason="rich is not installed")
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["show", runs[0][0]]) == 0
    out = terminal.getvalue()
    assert "\x1b[" in out
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    table = plain[: plain.index("•")]
    for group in runs[0][1][-1].layers.values():
        assert number(group.i1.trace) in table
        for value in (percent(group.i1.rel_error), count(group.i1.draws_for(0.1))):
            assert re.search(rf"(?<!\S){re.escape(value)}(?!\S)", table)
    assert max(map(len, table.splitlines())) <= columns
    assert ("a wider terminal also shows" in table) == (columns == 60)


def test_without_rich_a_terminal_gets_plain_lines(runs, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["show", runs[0][0]]) == 0
    assert "pairs for 10 %" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()
