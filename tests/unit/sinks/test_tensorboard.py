"""The event file: complete, finite, described, one writer, steady layers, and growth by a rule."""

import dataclasses
import itertools
import logging
import math
import re
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.errors import FimprobeError
from fimprobe.report.layer_names import label_layers
from fimprobe.report.run_info import collect_run_info
from fimprobe.sinks.tensorboard import event_file
from fimprobe.sinks.tensorboard.sink import FIRST_DRAWING_SECONDS, TensorboardSink, is_written
from fimprobe.training.schedule import Schedule
from tests.support.fresh_process import run_fresh
from tests.support.reports import FEW, build_report

RUN = collect_run_info(
    nn.Linear(3, 2),
    fimprobe.Config(seed=77),
    likelihood=fimprobe.likelihoods.Gaussian(sigma=0.5),
    decision="said so",
)
EVERYTHING = {"scalars": 0, "images": 0, "tensors": 0}


def load(log_dir):
    events = EventAccumulator(str(log_dir), size_guidance=EVERYTHING)
    events.Reload()
    return events


def text(events, tag):
    """The newest page of a tag."""
    return events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def write(log_dir, reports, **options):
    sink = TensorboardSink(log_dir, **options)
    for report in reports:
        sink.write(report)
    sink.close()
    return sink


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six reports of 40 layers; at the third the errors are not known."""
    log_dir = tmp_path_factory.mktemp("run")
    reports = [build_report(40, 10 * i, known=i != 2) for i in range(6)]
    write(log_dir, reports, run=lambda: RUN)
    return log_dir, reports


def test_every_tag_is_read_with_rising_steps_and_finite_values(run):
    log_dir, reports = run
    steps = [r.step for r in reports]
    for name in ("", "i1", "i2"):
        events = load(log_dir / name)
        for tag in events.Tags()["scalars"]:
            shown = events.Scalars(tag)
            assert [e.step for e in shown] == sorted({e.step for e in shown}), tag
            assert all(math.isfinite(e.value) for e in shown), tag
            assert {e.step for e in shown} <= set(steps)
    for key in ("i1", "i2"):
        events = load(log_dir / key)
        for tag, field in (("error_of_this_report", "rel_error"), ("error_with_1_label", None)):
            shown = events.Scalars(f"fim/{tag}")
            assert [e.step for e in shown] == [0, 10, 30, 40, 50]
            estimate = reports[0].total.get(key)
            value = getattr(estimate, field) if field else reports[0].error_of(key)
            assert shown[0].value == pytest.approx(value, rel=1e-6)
        traces = events.Scalars("fim/log10_trace")
        assert [e.step for e in traces] == steps
        for event, report in zip(traces, reports, strict=True):
            assert event.value == pytest.approx(math.log10(report.total.get(key).trace), abs=1e-5)
        (bound, *_) = events.Scalars("fim_matrix_bounds/log10_bound_of_total_label_variance")
        assert bound.value == pytest.approx(
            math.log10(reports[0].total.get(key).trace_bound), abs=1e-5
        )
    events = load(log_dir)
    for name in ("fisher_trace", "moment_norm"):
        shown = events.Scalars(f"fim_outputs/log10_{name}")
        for event, report in zip(shown, reports, strict=True):
            assert event.value == pytest.approx(math.log10(getattr(report.outputs, name)), abs=1e-5)


def test_the_estimators_are_runs_with_the_same_few_tags(run):
    """Every chart overlays the estimators; the first one is the error; layers have no tags."""
    log_dir, _ = run
    tags = {name: load(log_dir / name).Tags()["scalars"] for name in ("", "i1", "i2")}
    assert set(tags["i1"]) == set(tags["i2"])
    # the tab SCALARS sorts "/" and "_" as the same character
    every = sorted(
        {tag for names in tags.values() for tag in names}, key=lambda t: t.replace("_", "/")
    )
    assert len(every) <= 20 and every[0] == "fim/error_of_this_report"
    assert not set(tags[""]) & set(tags["i1"])
    groups = {tag.split("/")[0] for tag in every}
    assert groups == {"fim", "fim_matrix_bounds", "fim_outputs", "fim_probe"}


def test_the_empirical_fisher_and_hutchinson_are_runs_too(tmp_path):
    report = build_report(3, 0)
    data = dataclasses.replace(report.total.i1, cosine=0.5, trace_ratio=2.0)
    total = dataclasses.replace(report.total, ih=report.total.i1, empirical=data)
    write(tmp_path, [dataclasses.replace(report, total=total)], figures=False)
    ih = load(tmp_path / "ih").Tags()["scalars"]
    assert set(ih) == set(load(tmp_path / "i1").Tags()["scalars"])
    (cosine,) = load(tmp_path / "empirical").Scalars("fim_vs_empirical/cosine")
    assert cosine.value == 0.5


def test_the_share_of_the_wall_time_is_charted_once_it_is_known(tmp_path):
    shares = iter([None, 0.5, 0.25])
    reports = [build_report(3, n) for n in range(3)]
    write(tmp_path, reports, figures=False, overhead=lambda: next(shares))
    assert [e.value for e in load(tmp_path).Scalars("fim_probe/overhead")] == [0.5, 0.25]


def test_a_number_that_single_precision_does_not_hold_is_left_out(tmp_path):
    report = build_report(3, 0)
    broken = dataclasses.replace(report.total.i1, rel_error=1e39)
    total = dataclasses.replace(report.total, i1=broken)
    write(tmp_path, [dataclasses.replace(report, total=total)], figures=False)
    assert "fim/error_of_this_report" not in load(tmp_path / "i1").Tags()["scalars"]
    assert "fim/error_of_this_report" in load(tmp_path / "i2").Tags()["scalars"]


def test_there_is_no_chart_of_what_was_never_known(tmp_path):
    lost = [dataclasses.replace(build_report(3, n, known=False), outputs=None) for n in range(2)]
    write(tmp_path, lost, figures=False, histograms=False)
    assert load(tmp_path / "i1").Tags()["scalars"] == ["fim/log10_trace"]
    events = load(tmp_path)
    assert events.Tags()["scalars"] == ["fim_probe/seconds"]
    page = text(events, "fimprobe/advice")
    assert FEW in page and not re.search(r"\b(nan|None|inf)\b", page)
    about = text(events, "fimprobe/about")  # no reference to a tab that is empty
    assert "IMAGES" not in about and "HISTOGRAMS" not in about and "No pictures" in about


def test_labels_that_were_not_seen_leave_no_number_of_f(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    with torch.no_grad():
        net[2].bias[0] += 9.0
    options = {"likelihood": "categorical", "label_sampling": "model"}
    report = fimprobe.measure(net, torch.randn(40, 4), **options)
    assert report.total.i1.trace is None and not report.sizes
    write(tmp_path, [report], run=lambda: RUN)
    events = load(tmp_path)
    tags = events.Tags()
    first = load(tmp_path / "i1").Tags()
    assert all("bound_of" in tag for tag in first["scalars"]), first["scalars"]
    assert not first["tensors"]
    assert not [
        t for t in tags["images"] if t.endswith(("7_diagonal", "5_pairs_needed", "9_convergence"))
    ]
    page = events.Tensors("fimprobe/advice")[0].tensor_proto.string_val[0].decode()
    assert "pass label_sampling='size_biased' or draws='exact'" in page
    (about,) = events.Tensors("fimprobe/about")
    assert "2 labels from the model for each input" in about.tensor_proto.string_val[0].decode()


def test_the_page_on_the_run_is_written_again_at_the_first_whole_report(tmp_path):
    reports = [build_report(3, n, i2=n > 1) for n in range(4)]
    write(tmp_path, reports, figures=False)
    events = load(tmp_path)
    assert [e.step for e in events.Tensors("fimprobe/about")] == [0, 2]
    first, second = (e.tensor_proto.string_val[0].decode() for e in events.Tensors("fimprobe/about"))
    assert (
        "*i2* is Î₂" in second and "Î₂" not in first.split("## Coverage")[0].split("Definitions")[0]
    )
    assert [e.step for e in load(tmp_path / "i2").Scalars("fim/log10_trace")] == [2, 3]


def test_every_tag_is_described(run):
    log_dir, _ = run
    for name, start in (("", ""), ("i1", "Î₁ = the mean outer"), ("i2", "Î₂ = minus the mean")):
        events = load(log_dir / name)
        tags = events.Tags()
        for tag in {*tags["scalars"], *tags["images"], *tags["tensors"]}:
            description = events.SummaryMetadata(tag).summary_description
            assert len(description) > 20 and description.startswith(start), tag


def test_text_tells_the_run_and_the_advice(run):
    events, reports = load(run[0]), run[1]
    (about,) = events.Tensors("fimprobe/about")
    about = about.tensor_proto.string_val[0].decode()
    for told in (
        "| Settings | seed 77 |",
        "seed: 77\n",
        "draws: 2\n",
        "Gaussian(sigma=0.5) (said so)",
        "Linear, 8 trainable parameters (float32)",
        "categorical",
        "| contracted | 40 |",
        "√(Σᵢ Var F̂ᵢᵢ)",
        "32 inputs, 2 size-biased labels for each input",
        "`error_with_1_label`",
        "reports 4, 8, 16",
    ):
        assert told in about
    pages = events.Tensors("fimprobe/advice")
    assert [p.step for p in pages] == [r.step for r in reports]
    page = pages[3].tensor_proto.string_val[0].decode()
    assert all(line in page for line in reports[3].advice) and "| total |" in page


def test_pictures_come_at_a_growing_rule_and_at_the_end(run):
    events = load(run[0])
    assert [e.step for e in events.Images("fim_pictures/3_error_by_layer")] == [30, 50]
    assert [e.step for e in events.Images("fim_pictures/5_pairs_needed")] == [50]
    names = {"1_error", "2_trace", "3_error_by_layer", "4_variance_and_bound", "5_pairs_needed"} | {
        "4b_labels_by_estimator"
    }
    names |= {"6_bound_of_the_matrix", "7_diagonal", "9_convergence"}
    assert set(events.Tags()["images"]) == {f"fim_pictures/{n}" for n in names}


def test_histograms_count_every_parameter(run, tmp_path):
    events, reports = load(run[0] / "i1"), run[1]
    rows = _floats(events.Tensors("fim_spread/rel_error")[0])
    assert rows.view(-1, 3)[:, 2].sum() == 40
    entries = _floats(events.Tensors("fim_spread/log10_diagonal")[0]).view(-1, 3)
    assert entries[:, 2].sum() == sum(g.numel for g in reports[0].layers.values())
    write(tmp_path, [build_report(3, 0)], histograms=False, figures=False)
    assert not load(tmp_path / "i1").Tags()["tensors"] and not load(tmp_path).Tags()["images"]


def test_the_histogram_of_the_diagonal_is_that_of_its_entries(tmp_path):
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    report = fimprobe.measure(net, torch.randn(16, 5), likelihood="categorical", diagonals=True)
    write(tmp_path, [report], figures=False)
    rows = _floats(load(tmp_path / "i1").Tensors("fim_spread/log10_diagonal")[0]).view(-1, 3)
    entries = torch.cat([d.flatten() for d in report.total.i1.diagonal.values()])
    entries = entries[entries > 0].double().log10()
    assert rows[:, 2].sum() == len(entries)
    middle = float((rows[:, :2].mean(1) * rows[:, 2]).sum() / len(entries))
    assert middle == pytest.approx(float(entries.mean()), abs=0.3)  # bins of half a decade


def _floats(event):
    return torch.frombuffer(bytearray(event.tensor_proto.tensor_content), dtype=torch.float64)


def test_layers_are_those_of_the_first_report_also_when_resumed(tmp_path):
    reports = [build_report(40, 10 * i) for i in range(4)]
    before = write(tmp_path, reports[:3], top=4, figures=False)
    need = {n: g.i1.pairs_for(0.1) for n, g in reports[0].layers.items()}
    assert sorted(before.layers) == sorted(sorted(need, key=need.get)[-4:])
    late = {n: g.i1.pairs_for(0.1) for n, g in reports[2].layers.items()}
    assert set(sorted(late, key=late.get)[-4:]) != set(before.layers)
    after = write(tmp_path, [reports[2], reports[3]], top=7, figures=False, purge_step=20)
    assert after.layers == before.layers
    events = load(tmp_path / "i1")
    assert [e.step for e in events.Scalars("fim/log10_trace")] == [0, 10, 20, 30]
    shown = {t.split("/")[1] for t in events.Tags()["scalars"] if t.startswith("fim_layer_error/")}
    labels = label_layers(reports[0].to_dict())
    assert shown == {labels[name] for name in before.layers}


def test_a_run_resumed_within_a_second_is_read_in_order(tmp_path, monkeypatch):
    """TensorBoard's names end in a counter, and "10" sorts before "9"."""
    counter = itertools.count(9)
    monkeypatch.setattr(event_file, "_file_numbers", counter)
    write(tmp_path, [build_report(3, n) for n in (0, 1, 2)], figures=False)
    write(tmp_path, [build_report(3, n) for n in (2, 3)], figures=False, purge_step=2)
    assert next(counter) == 15
    assert [e.step for e in load(tmp_path / "i1").Scalars("fim/log10_trace")] == [0, 1, 2, 3]


def test_a_second_writer_is_refused_and_a_crash_leaves_nothing_in_the_way(tmp_path, caplog):
    code = (
        "import os, sys; from fimprobe.sinks.tensorboard.sink import TensorboardSink\n"
        "sink = TensorboardSink(sys.argv[1], figures=False); print('open', flush=True)\n"
        "sys.stdin.read(); os._exit(1)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "open\n"
        refused = rf"another probe \(process {other.pid}\).*pass another folder"
        with pytest.raises(FimprobeError, match=refused):
            TensorboardSink(tmp_path)
        options, net = {"log_dir": tmp_path, "likelihood": "categorical"}, nn.Linear(3, 2)
        with fimprobe.attach(net, **options) as probe:
            assert probe.step(torch.randn(4, 3)) is not None
        assert not (tmp_path / "fimprobe.jsonl").exists()
        assert len([r for r in caplog.records if "another probe" in r.message]) == 1
    assert other.returncode == 1
    first = TensorboardSink(tmp_path, figures=False)
    with pytest.raises(FimprobeError, match="another probe"):  # of this process as well
        TensorboardSink(tmp_path)
    first.close()
    first.close()
    TensorboardSink(tmp_path, figures=False).close()


def test_a_training_that_resumes_in_its_process_takes_over(tmp_path):
    left = TensorboardSink(tmp_path, figures=False)
    for step in range(3):
        left.write(build_report(3, step))
    write(tmp_path, [build_report(3, 2), build_report(3, 3)], figures=False, purge_step=2)
    with pytest.raises(FimprobeError, match="a resumed training writes to this folder now"):
        left.write(build_report(3, 9))
    left.close()
    assert [e.step for e in load(tmp_path / "i1").Scalars("fim/log10_trace")] == [0, 1, 2, 3]
    TensorboardSink(tmp_path, figures=False).close()


def test_a_report_is_on_disk_when_write_returns(tmp_path):
    sink = TensorboardSink(tmp_path, figures=False)
    for step in range(4):
        sink.write(build_report(3, step))
        shown = load(tmp_path / "i1").Scalars("fim/log10_trace")
        assert [e.step for e in shown] == list(range(step + 1))
    sink.close()


def test_files_grow_by_the_rule(tmp_path, monkeypatch):
    kept = [n for n in range(1, 10_001) if is_written(n, 100)]
    assert kept[:100] == list(range(1, 101)) and len(kept) <= 100 * (1 + math.log2(100))
    monkeypatch.setattr("fimprobe.sinks.tensorboard.sink.MAX_DENSE_REPORTS", 4)
    monkeypatch.setattr("fimprobe.sinks.tensorboard.sink.MAX_DENSE_PAGES", 2)
    write(tmp_path, [build_report(3, n) for n in range(1, 12)], figures=False)
    events = load(tmp_path / "i1")
    assert [e.step for e in events.Scalars("fim/log10_trace")] == [1, 2, 3, 4, 6, 8, 11]
    events = load(tmp_path)
    assert [e.step for e in events.Tensors("fimprobe/advice")] == [1, 2, 4, 8, 11]


def test_without_matplotlib_one_line_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("drawing", "pictures", "gallery"):
        monkeypatch.delitem(sys.modules, f"fimprobe.{name}", raising=False)
    with caplog.at_level(logging.INFO):
        write(tmp_path, [build_report(3, n) for n in range(3)])
    (line,) = [r.message for r in caplog.records]
    assert "pip install 'fimprobe[plots]'" in line and "figures" in line
    events = load(tmp_path)
    assert not events.Tags()["images"] and load(tmp_path / "i1").Scalars("fim/log10_trace")
    assert "No pictures: matplotlib is missing" in str(events.Tensors("fimprobe/about")[0])


def test_neither_import_nor_measure_loads_matplotlib():
    code = "import sys, fimprobe, fimprobe.sinks.tensorboard.sink; print('matplotlib' in sys.modules)"
    done = run_fresh(code)
    assert done.stdout == "False\n", done.stderr


class Room(Schedule):
    """Has room for pictures at some of the times that it is asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.taken = list(answers), [], []

    def can_afford(self, seconds):
        self.asked.append(seconds)
        return self.answers.pop(0)

    def charge(self, seconds):
        self.taken.append(seconds)


def test_pictures_wait_for_the_budgets_room(tmp_path):
    room = Room(False, False, True)  # reports 4, 5, 6; the last set is drawn at any cost
    write(tmp_path / "later", [build_report(3, n) for n in range(1, 8)], schedule=room)
    images = load(tmp_path / "later").Images("fim_pictures/3_error_by_layer")
    assert [e.step for e in images] == [6, 7]
    assert room.asked == [FIRST_DRAWING_SECONDS] * 3 and len(room.taken) == 2
    write(tmp_path / "never", [build_report(3, n) for n in range(6)], schedule=Room(*[False] * 3))
    events = load(tmp_path / "never")
    assert [e.step for e in events.Images("fim_pictures/3_error_by_layer")] == [5]
    assert len(load(tmp_path / "never" / "i1").Scalars("fim/log10_trace")) == 6


def test_the_time_that_pictures_took_is_asked_for_next(tmp_path):
    room = Room(True, True)  # reports 4 and 8
    write(tmp_path, [build_report(3, n) for n in range(9)], schedule=room)
    assert room.asked == [FIRST_DRAWING_SECONDS, room.taken[0]]
    assert len(room.taken) == 3 and min(room.taken) > 0


def test_the_last_report_has_every_picture_once(tmp_path):
    """Also where some of them were drawn when it was written."""
    write(tmp_path, [build_report(3, n) for n in range(4)])
    events = load(tmp_path)
    assert len(events.Tags()["images"]) == 9
    for tag in events.Tags()["images"]:
        assert [e.step for e in events.Images(tag)] == [3], tag


def test_a_link_in_place_of_a_run_is_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "i1").symlink_to(target)
    sink = TensorboardSink(tmp_path / "run", figures=False)
    with pytest.raises(FimprobeError, match="i1' is a link"):
        sink.write(build_report(3, 0))
    sink.close()
    assert not list(target.iterdir())
