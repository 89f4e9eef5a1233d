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
from fimprobe.cli.commands import main
from fimprobe.report.comparison import find_differences, make_comparison
from fimprobe.report.footnotes import footnotes
from fimprobe.report.format import (
    count_with_error,
    number,
    percent,
    sparkline,
    with_error,
    without_error,
)
from fimprobe.report.table import make_rows
from fimprobe.report.trends import make_trends
from fimprobe.runs.terminal import _color
from tests.support.reports import build_report
from tests.support.runs import deep_net, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two layers, and one of 30."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b", "many")]
    found = [
        write_run(folders[0]).history,
        write_run(folders[1], reports=4, draws=3, batch=4, estimators=["i1"], scale=1.3).history,
        write_run(folders[2], lambda: deep_net(layers=30), reports=1, bounds=False).history,
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
        values = [with_error(e.trace, e.std_error) for e in (group.i1, group.i2)]
        values += [percent(e.rel_error) for e in (group.i1, group.i2)]
        for value in values:
            assert re.search(rf"(?<!\S){re.escape(value)}(?!\S)", row), (value, row)
    for sentence in last.advice:
        assert sentence in out
    trend = lines["total"]  # the last line that starts so: the trends'
    for value in (reports[0].total.i1.trace, last.total.i1.trace):
        assert number(value) in trend
    assert "\x1b" not in out  # no colours where nobody looks


def test_trends_are_the_series(runs):
    reports = [r.to_dict() for r in runs[0][1]]
    rows = make_trends(reports)
    layers = reports[-1]["layers"]
    ordered = [(f"{name} Linear", layers[name]) for name in "01"]
    ordered.sort(key=lambda layer: -layer[1]["i1"]["rel_error"])
    assert [row[0] for row in rows] == ["layer", "total", *(label for label, _ in ordered)]
    for column, show, series in (
        (1, percent, [r.layers["0"].i1.error_of(inputs=8) for r in runs[0][1]]),
        (2, number, [r.layers["0"].i1.trace for r in runs[0][1]]),
        (3, number, [r.layers["0"].i1.label_variance for r in runs[0][1]]),
    ):
        want = f"{show(series[0])} {sparkline(series)} {show(series[-1])}"
        (row,) = (row for row in rows if row[0] == "0 Linear")
        assert row[column].split() == want.split()


def test_a_trend_ends_in_what_the_last_report_says():
    records = [build_report(3, 1000 * i, known=i < 2).to_dict() for i in range(3)]
    for record, row in zip(["total", "0", "1", "2"], make_trends(records)[1:], strict=True):
        group = records[0]["total"] if record == "total" else records[0]["layers"][record]
        assert row[1].split()[:2] == percent(group["i1"]["one_label_error"]).split()
        assert row[1].split()[-1] == "–"
        assert row[2].split()[-1] != "–"
    assert all(row[1] == "–" for row in make_trends(records[2:])[1:])


def test_with_exact_labels_both_errors_stand_in_the_table(tmp_path, capsys):
    (*_, last) = write_run(tmp_path, draws="exact").history
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {row[0].split()[0]: row for row in make_rows(last.to_dict(), view="all")}
    assert rows["layer"][4:8] == ("error: Î₁", "error: Î₂", "1 label: Î₁", "1 label: Î₂")
    rows = {name: (*row[:5], *row[6:]) for name, row in rows.items()}
    for name, group in {**last.layers, "total": last.total}.items():
        want = [percent(group.i1.rel_error)]
        for e in (group.i1, group.i2):
            pair = e.label_variance + e.input_variance
            want.append(percent((pair / last.batch_size) ** 0.5 / e.norm))
        assert list(rows[name][4:7]) == want
        assert re.search(rf"(?<!\S){re.escape(want[0])}(?!\S)", out)
    assert f"F of the whole model is off by {rows['total'][4]} at 8 inputs, exact labels" in out
    off = f"Î₁ would be off by {rows['total'][5]} and Î₂ by {rows['total'][6]}."
    assert f"With one label from the model for each of 8 inputs, {off}" in out
    assert "error: the error of this report, how far off its F is with 8 inputs, exact labels" in out
    one = "how far off an estimator would be with one label from the model for each of 8 inputs"
    assert f"1 label: the error with 1 label, {one}" in last.table("variances")


def group(trace=1.0, **values):
    """A group of a record of which an estimator knows what is given."""
    names = ("std_error", "rel_error", "one_label_error", "pairs_for_10_percent", "pairs_error")
    names += ("label_variance", "input_variance", "tightness")
    estimate = {"trace": trace, **dict.fromkeys(names), "unknown": {}, **values}
    return {"numel": 5, "i1": estimate}


def record(**groups):
    return {
        "step": 0, "batch_size": 40, "draws": 2, "label_sampling": "size_biased", "seconds": 0.1,
        "likelihood": "categorical", "total": groups.pop("total"), "layers": groups, "advice": [],
    }  # fmt: skip


FEW = "too few inputs have a gradient that counts ({} of 40); take more inputs"
KNOWN = {
    "std_error": 0.1, "rel_error": 0.2, "one_label_error": 0.4, "pairs_for_10_percent": 640.0,
    "pairs_error": 0.12, "label_variance": 3.0, "input_variance": 2.0,
}  # fmt: skip


def lacking(**reasons):
    """What is known but for some numbers, with the reasons for these."""
    names = {"pairs": ("one_label_error", "pairs_for_10_percent", "pairs_error")}
    gone = [name for key in reasons for name in names.get(key, (key,))]
    return KNOWN | dict.fromkeys(gone) | {"unknown": reasons}


def reasons_of(given, **options):
    notes = footnotes(given, **({"view": "all"} | options))
    return [line for line in notes if line.startswith("–")]


def test_the_footnotes_tell_the_reason_of_every_dash():
    few = {name: FEW.format(2.1) for name in ("std_error", "rel_error", "pairs")}
    also = {name: FEW.format(3) for name in ("std_error", "rel_error", "pairs")}
    given = record(
        total=group(**lacking(**few)),
        a=group(**lacking(**also, input_variance="lost in its noise (-1 ± 2)")),
        b=group(**KNOWN),
    )
    errors = "± of trace F: Î₁, error: Î₁, 1 label: Î₁, pairs for 10 %: Î₁"
    assert reasons_of(given) == [
        f"– {errors} in total, a: {FEW.format('2.1')[: -len(' of 40); take more inputs')]} of 40 in "
        "total); take more inputs",
        "– input variance in a: lost in its noise (-1 ± 2); take more inputs, or draws='exact'",
    ]
    # of the columns and the rows that are shown only
    assert len(reasons_of(given, without=("input variance",))) == 1
    assert reasons_of(record(total=group(**KNOWN), a=group(**KNOWN))) == []
    pairs = lacking(pairs=FEW.format(2.1))
    only = record(total=group(**KNOWN), a=group(**KNOWN), b=group(**pairs))
    assert len(reasons_of(only)) == 1 and reasons_of(only, top=1) == []


def test_the_footnotes_hold_the_remedy():
    lost = "lost in its noise (1 ± 2)"
    for draws, remedy in ((2, "take more inputs, or draws='exact'"), ("exact", "take more inputs")):
        given = record(total=group(**lacking(label_variance=lost))) | {"draws": draws}
        assert reasons_of(given) == [f"– label variance: Î₁ in total: {lost}; {remedy}"]
    second = {**lacking(label_variance=lost), "probe_error": 2.0, "trace": 1.0}
    given = record(total=group(**KNOWN) | {"i2": second})
    (told,) = reasons_of(given)
    assert told == (
        f"– label variance: Î₂ in total: {lost}; take more inputs, or second_order={{'probes': ...}}"
    )
    one = record(total=group(**KNOWN | {"label_variance": None, "input_variance": None}))
    assert reasons_of(one | {"draws": 1}) == [
        "– label variance: Î₁, input variance in total: one label for each input does not determine "
        "it; take draws=2 or more"
    ]
    unseen = "the drawn labels carry 0.3 % of the expected score; pass draws='exact'"
    nothing = dict.fromkeys(("trace", *KNOWN)) | {
        "unknown": dict.fromkeys(("trace", *KNOWN, "pairs"), unseen)
    }
    whole = record(total=group(**nothing), a=group(**nothing), b=group(**nothing))
    assert reasons_of(whole) == [f"– all numbers everywhere: {unseen}"]


def test_many_causes_are_counted():
    layers = {
        f"l{i}": group(**lacking(label_variance=f"cause {'abcdefgh'[i]}; do this")) for i in range(8)
    }
    told = reasons_of(record(total=group(**KNOWN), **layers))
    assert len(told) == 7
    assert told[-1] == "– 2 more reasons in the record, under 'unknown'"
    same = {f"l{i}": group(**lacking(label_variance="one cause; do this")) for i in range(8)}
    (told,) = reasons_of(record(total=group(**KNOWN), **same))
    assert told == "– label variance: Î₁ in l0, l1, l2 and 5 more: one cause; do this"


@pytest.mark.parametrize("name", ["few", "confident", "unseen", "one draw"])
def test_every_dash_of_a_real_table_has_a_reason_and_no_number_is_odd(name):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad():
        net[2].bias[0] += 9.0 if name in ("confident", "unseen") else 0.0
    options = {"unseen": {"label_sampling": "model"}, "one draw": {"draws": 1}}.get(name, {})
    report = fimprobe.measure(
        net, torch.randn(3 if name == "few" else 40, 4), likelihood="categorical", **options
    )
    given = report.to_dict()
    head, *rows = make_rows(given, view="all")
    told = [re.fullmatch(r"– (.*?) (?:in (.*?)|everywhere): (.{20,})", x) for x in reasons_of(given)]
    for row in rows:
        for column, cell in zip(head[2:-1], row[2:-1], strict=True):
            assert not re.search(r"nan|inf|None|e\+", cell), cell
            column = f"± of {column}" if cell.endswith(" ± –") else column
            named = [
                found
                for found in told
                if {column, "all numbers"} & set(found[1].split(", "))
                and (found[2] is None or row[0] in found[2].split(", "))
            ]
            assert len(named) == cell.endswith("–"), (column, row[0], told)
    shown = [*make_rows(given)[1:], *make_rows(given, view="variances")[1:]]
    assert any(cell.endswith("–") for row in shown for cell in row) == (name != "confident")
    if name == "few":
        assert "3 inputs are too few for an error; take 5 or more" in str(report)


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
    last = {name: write_run(folder / name).history[-1] for name in ("a", "b")}
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
    assert "which has 3 runs. Pass one" in capsys.readouterr().err
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
    need = sorted(reports[0].layers, key=lambda n: -reports[0].layers[n].i1.rel_error)
    rows = [row[0] for row in make_rows(reports[0].to_dict(), top=3)]
    assert rows == ["layer", *(f"{name} Linear" for name in need[:3]), "total"]
    assert "(27 layers with the smallest need are not shown: --top 30)" in out
    assert main(["show", folder, "--top", "0"]) == 1


def test_two_runs_side_by_side(runs, capsys):
    (a, one), (b, two) = runs[:2]
    assert main(["show", a, b]) == 0
    out = capsys.readouterr().out
    rows = {r[0].split()[0]: r for r in make_comparison(one[-1].to_dict(), two[-1].to_dict())}
    for name in ("0", "1", "total"):
        x, y = ((r.layers | {"total": r.total})[name].i1 for r in (one[-1], two[-1]))
        shown = [without_error(with_error(e.trace, e.std_error)) for e in (x, y)]
        assert list(rows[name][1:3]) == shown
        assert float(rows[name][3].rstrip("×").replace(",", "")) == pytest.approx(
            y.trace / x.trace, rel=0.06, abs=0
        )
        assert rows[name][4:6] == (percent(x.rel_error), percent(y.rel_error))
        pairs = [count_with_error(e.pairs_for(0.1), e.pairs_error) for e in (x, y)]
        assert list(rows[name][10:12]) == [without_error(text) for text in pairs]
    told = [line for line in out.splitlines() if line.startswith("Careful: ")]
    for difference in ("labels for each input differ: A 2, B 3", "inputs differ: A 8, B 4"):
        assert any(difference in line for line in told)
    assert any("estimators differ: A i1, i2, B i1" in line for line in told)
    assert any("step differs: A 2, B 3" in line for line in told)
    assert "likelihood" not in "".join(told)
    assert "Run A\nEach layer by Î₁, step 0 to 2: " in out
    assert "Run B\nEach layer by Î₁, step 0 to 3: " in out


def test_equal_configurations_are_not_warned_of(runs, capsys):
    assert main(["show", runs[0][0], runs[0][0]]) == 0
    out = capsys.readouterr().out
    assert "Careful" not in out
    assert "1×" in out


def test_layers_and_likelihoods_that_differ(runs, tmp_path, capsys):
    write_run(tmp_path, lambda: deep_net(layers=3), reports=3, likelihood="gaussian").history
    assert main(["show", runs[0][0], str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "likelihood differs: A categorical, B gaussian" in out
    assert "layers differ: only in A –; only in B 2" in out


def test_layers_of_one_number_and_two_classes_are_no_pair():
    """Numbers in a Sequential: 0 is the same layer, 1 is not, 2 is in A alone."""
    a, b = build_report(3, 0).to_dict(), build_report(2, 0).to_dict()
    a["coverage"] = {f"{i}.weight": "autograd: Linear rule" for i in range(3)}
    b["coverage"] = a["coverage"] | {"1.weight": "autograd: BatchNorm2d rule"}
    rows = [row[:3] for row in make_comparison(a, b)[1:]]
    one, two = (
        without_error(
            with_error(r["layers"]["1"]["i1"]["trace"], r["layers"]["1"]["i1"]["std_error"])
        )
        for r in (a, b)
    )
    assert [row[0] for row in rows] == ["1 Linear", "2 Linear", "0 Linear", "1 BatchNorm2d", "total"]
    assert rows[0] == ("1 Linear", one, "–") and rows[3] == ("1 BatchNorm2d", "–", two)
    told = "layers differ: only in A 1 Linear, 2 Linear; only in B 1 BatchNorm2d."
    assert find_differences(a, b)[-1] == told
    del b["coverage"]  # of a version that did not write it: names are all that is known
    assert [row[0] for row in make_comparison(a, b)[1:]] == [*(x[0] for x in rows[:3]), "total"]


def test_a_number_on_one_screen_has_one_rounding(runs, capsys):
    folder, reports = runs[0]
    assert main(["show", folder]) == 0
    out = capsys.readouterr().out
    total = reports[-1].total.i1
    trace = with_error(total.trace, total.std_error)
    step_by_step = next(x for x in out.splitlines() if x.split()[:1] == [str(reports[-1].step)])
    trends = next(x for x in reversed(out.splitlines()) if x.startswith("total"))
    assert trace in step_by_step and count_with_error(total.pairs_for(0.1), total.pairs_error) in out
    assert without_error(trace) in trends.split()


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("20", 60), ("0", None), ("", None)])
def test_output_to_a_program_is_as_wide_as_columns_says(runs, capsys, monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["show", runs[0][0]]) == 0
    out = capsys.readouterr().out.partition("\nModel:")[0]
    longest = max(map(len, out.splitlines()))
    assert longest > 120 if width is None else width - 20 < longest <= width
    # what stands for a column goes with it
    assert ("Î₂ minus the mean Hessian" in " ".join(out.split())) == (
        "trace F: Î₂" in out.partition("---")[0]
    )


def test_mistakes_are_told(runs, tmp_path, capsys):
    for arguments, told in (
        ([runs[0][0]] * 3, "or two to compare, got 3"),
        ([runs[0][0]] * 2 + ["--html", str(tmp_path / "x.html")], "must be used with a single run"),
        (
            [runs[0][0], "--html", str(tmp_path / "no" / "x.html")],
            "must be a path that can be written",
        ),
        ([str(tmp_path)], "must be a directory with a fimprobe.jsonl"),
    ):
        assert main(["show", *arguments]) == 1
        assert told in capsys.readouterr().err


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 80, 120])
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
    assert "verdict" in table
    for group in runs[0][1][-1].layers.values():
        trace = [with_error(group.i1.trace, group.i1.std_error)] * (columns > 60)
        for value in [*trace, percent(group.i1.rel_error)]:
            assert re.search(rf"(?<!\S){re.escape(value)}(?!\S)", table)
        second = with_error(group.i2.trace, group.i2.std_error)
        assert bool(re.search(rf"(?<!\S){re.escape(second)}(?!\S)", table)) == (columns >= 80)
    assert main(["show", runs[0][0], runs[1][0]]) == 0
    everything = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).splitlines()
    assert max(len(line) for line in everything if not line.startswith(("A: ", "B: "))) <= columns
    assert ("a wider terminal also shows" in table) == (columns < 100)


@pytest.mark.parametrize(
    ("cell", "colour"),
    [
        ("< 0.001 %", "green"), ("10 %", "green"), ("10.1 %", "yellow"), ("50 %", "yellow"),
        ("50.1 %", "red"), ("1,465 %", "red"), ("12.3 million %", "red"),
        ("> 1,000 trillion %", "red"), ("–", None), ("31 % ▁█ 45 %", None), ("1,622 ± 12 %", None),
    ],
)  # fmt: skip
def test_errors_are_coloured_by_how_bad_they_are(cell, colour):
    assert _color(cell) == colour


def test_without_rich_a_terminal_gets_plain_lines(runs, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["show", runs[0][0]]) == 0
    assert "pairs for 10 %" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()
