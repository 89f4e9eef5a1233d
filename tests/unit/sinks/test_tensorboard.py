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
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

import fimprobe
from fimprobe.errors import FimprobeError
from fimprobe.report.run_info import collect_run_info
from fimprobe.sinks.tensorboard.sink import TensorboardSink, is_written
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
LAYOUT = "custom_scalars__config__"


def load(log_dir):
    events = EventAccumulator(str(log_dir), size_guidance=EVERYTHING)
    events.Reload()
    return events


def layout_of(events):
    (*_, last) = events.Tensors(LAYOUT)
    return layout_pb2.Layout.FromString(last.tensor_proto.string_val[0])


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
    write(log_dir, reports, run=lambda: RUN, top=20)
    return load(log_dir), reports


def test_every_tag_is_read_with_rising_steps_and_finite_values(run):
    events, reports = run
    steps = [r.step for r in reports]
    scalars = events.Tags()["scalars"]
    for tag in scalars:
        shown = events.Scalars(tag)
        assert [e.step for e in shown] == sorted({e.step for e in shown}), tag
        assert all(math.isfinite(e.value) for e in shown), tag
        assert {e.step for e in shown} <= set(steps)
    assert [e.step for e in events.Scalars("fim/i1/trace")] == steps
    assert [e.step for e in events.Scalars("fim/i1/rel_error")] == [0, 10, 30, 40, 50]
    groups = {tag.split("/")[0] for tag in scalars}
    assert groups == {
        "fim", "fim_bounds", "fim_bands", "fim_layers", "fim_log10", "fim_outputs", "fim_probe",
    }  # fmt: skip
    assert [e.step for e in events.Scalars("fim/i2/one_label_error")] == [0, 10, 30, 40, 50]
    for name in ("fisher_trace", "fisher_norm", "moment_norm"):
        for event, report in zip(events.Scalars(f"fim_outputs/{name}"), reports, strict=True):
            assert event.value == pytest.approx(getattr(report.outputs, name), rel=1e-6)
    assert all(0 < e.value <= 1 for e in events.Scalars("fim_probe/overhead"))
    for event, report in zip(events.Scalars("fim_log10/i1/trace_bound"), reports[:2], strict=False):
        assert event.value == pytest.approx(math.log10(report.total.i1.trace_bound), rel=1e-5)


def test_bands_share_their_steps_and_hold_two_standard_errors(run):
    events, reports = run
    values = [
        t
        for t in events.Tags()["scalars"]
        if t.startswith("fim_bands") and t[-3:] not in ("_lo", "_hi")
    ]
    assert "fim_bands/i2/trace" in values and len(values) == 2 + 2 * 13
    for tag in values:
        trio = [events.Scalars(tag + end) for end in ("_lo", "", "_hi")]
        assert [[e.step for e in line] for line in trio] == [[0, 10, 30, 40, 50]] * 3
        for low, middle, high in zip(*trio, strict=True):
            assert low.value < middle.value < high.value
    total = reports[1].total.i2
    high = events.Scalars("fim_bands/i2/trace_hi")[1].value
    assert high == pytest.approx(total.trace + 2 * total.std_error, rel=1e-6)


@pytest.mark.parametrize("name", ["std_error", "trace"])
def test_a_band_without_all_three_is_left_out(tmp_path, name):
    report = build_report(3, 0)
    broken = dataclasses.replace(report.total.i1, **{name: 1e39})  # infinite in single precision
    total = dataclasses.replace(report.total, i1=broken)
    write(tmp_path, [dataclasses.replace(report, total=total)], figures=False)
    tags = load(tmp_path).Tags()["scalars"]
    assert not [t for t in tags if t.startswith("fim_bands/i1")]
    assert f"fim/i1/{name}" not in tags and "fim_bands/i2/trace_hi" in tags


def test_the_dashboard_names_tags_that_exist(run):
    events, _ = run
    tags = events.Tags()["scalars"]
    margins = 0
    categories = layout_of(events).category
    titles = [c.title for c in categories[0].chart]
    one, mine = (
        "Relative error, 1 label from the model for each input (0.1 good, 1 noise)",
        "this report's F",
    )
    assert titles[:3] == [
        f"{one}: Î₁, Î₂",
        f"Relative error of {mine}: Î₁, Î₂",
        "(input, label) pairs needed for 10 % error: Î₁, Î₂",
    ]
    outputs = {c.title: list(c.multiline.tag) for c in categories[0].chart if "outputs" in str(c)}
    assert outputs == {
        "tr I(h): the model is confident where it is small": ["fim_outputs/fisher_trace$"],
        "‖M‖_F, the fourth moment of the outputs": ["fim_outputs/moment_norm$"],
    }
    assert [c.title[:1] for c in categories] == ["1", "2", "3", "4", "5"]
    for category in categories:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert [t for t in tags if re.match(pattern, t)], pattern
            for series in chart.margin.series:
                margins += 1
                assert {series.value, series.lower, series.upper} <= set(tags)
    assert margins == 28


@pytest.mark.parametrize("draws", [2, None])
def test_the_dashboard_is_of_one_drawn_label_however_it_was_measured(tmp_path, draws):
    how = "size_biased" if draws else "exact"
    reports = [
        dataclasses.replace(build_report(3, n), draws=draws, label_sampling=how) for n in range(2)
    ]
    write(tmp_path, reports, figures=False)
    events = load(tmp_path)
    good, worst = layout_of(events).category[:2]
    assert [c.title for c in good.chart][:2] == [
        "Relative error, 1 label from the model for each input (0.1 good, 1 noise): Î₁, Î₂",
        "Relative error of this report's F: Î₁, Î₂",
    ]
    assert list(worst.chart[0].multiline.tag) == ["fim_layers/.*/i1_one_label_error$"]
    for event, report in zip(events.Scalars("fim/i2/one_label_error"), reports, strict=True):
        e = report.total.i2
        pair = (e.label_variance + e.input_variance) / report.batch_size
        assert event.value == pytest.approx(pair**0.5 / e.norm, rel=1e-6)


def test_the_dashboard_has_no_chart_of_what_was_never_known(tmp_path):
    lost = [dataclasses.replace(build_report(3, n, known=False), outputs=None) for n in range(2)]
    write(tmp_path, lost, figures=False)
    events = load(tmp_path)
    tags = events.Tags()["scalars"]
    assert not [
        t for t in tags if "error" in t or "pairs" in t or t.startswith(("fim_bands", "fim_outputs"))
    ]
    assert [c.title for c in layout_of(events).category] == ["5 · What the probe costs"]
    page = events.Tensors("fimprobe/advice")[0].tensor_proto.string_val[0].decode()
    assert FEW in page and not re.search(r"\b(nan|None|inf)\b", page)


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
    bounds = ("bound", "sharp_bound", "trace_bound", "diagonal_bound", "probe_error")
    geometry = {"fim_outputs", "fim_probe"}
    left = [t for t in tags["scalars"] if t.split("/")[0] not in geometry]
    assert all(t.rpartition("/")[2] in bounds for t in left), left
    assert not [t for t in tags["tensors"] if t.startswith("fim_spread/i1")]
    assert not [
        t for t in tags["images"] if t.endswith(("5_diagonal", "3_pairs_needed", "7_convergence"))
    ]
    page = events.Tensors("fimprobe/advice")[0].tensor_proto.string_val[0].decode()
    assert "pass label_sampling='size_biased' or draws='exact'" in page
    (about,) = events.Tensors("fimprobe/about")
    assert "2 labels from the model for each input" in about.tensor_proto.string_val[0].decode()


def test_runs_of_other_layers_share_the_charts_of_layers(tmp_path):
    def charts(layers):
        write(tmp_path / str(layers), [build_report(layers, 0)], figures=False)
        return layout_of(load(tmp_path / str(layers))).category[1].chart

    (one, two), (three, four) = charts(3), charts(12)
    assert one == three and two == four and one != two


def test_the_dashboard_grows_when_values_come_later(tmp_path):
    write(tmp_path, [build_report(3, 0, known=False), build_report(3, 1)], figures=False)
    events = load(tmp_path)
    first, last = (
        layout_pb2.Layout.FromString(e.tensor_proto.string_val[0]) for e in events.Tensors(LAYOUT)
    )
    assert "margin" not in str(first) and "fim_bands/i1/trace_lo" in str(last)


def test_every_tag_is_described(run):
    events, _ = run
    tags = events.Tags()
    for tag in {*tags["scalars"], *tags["images"], *tags["tensors"]} - {LAYOUT}:
        meta = events.SummaryMetadata(tag)
        assert len(meta.summary_description) > 20, tag
    (*_, tag) = (t for t in tags["scalars"] if t.endswith("/i2_rel_error"))
    told = events.SummaryMetadata(tag).summary_description
    assert told.startswith(f"Layer {tag.split('/')[1]}, Î₂. How far off")


def test_text_tells_the_run_and_the_advice(run):
    events, reports = run
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
        "`one_label_error`",
        "reports 4, 8, 16",
    ):
        assert told in about
    pages = events.Tensors("fimprobe/advice")
    assert [p.step for p in pages] == [r.step for r in reports]
    page = pages[3].tensor_proto.string_val[0].decode()
    assert all(line in page for line in reports[3].advice) and "| total |" in page


def test_pictures_come_at_a_growing_rule_and_at_the_end(run):
    events, _ = run
    assert [e.step for e in events.Images("fim_pictures/3_pairs_needed")] == [30, 50]
    names = {"1_relative_error", "2_variance_and_bound", "3_pairs_needed"}
    names |= {"4_bound_of_the_matrix", "5_diagonal", "6_error_by_confidence", "7_convergence"}
    assert set(events.Tags()["images"]) == {f"fim_pictures/{n}" for n in names}


def test_histograms_count_every_parameter(run, tmp_path):
    events, reports = run
    rows = _floats(events.Tensors("fim_spread/i1/rel_error")[0])
    assert rows.view(-1, 3)[:, 2].sum() == 40
    entries = _floats(events.Tensors("fim_spread/i1/log10_diagonal")[0]).view(-1, 3)
    assert entries[:, 2].sum() == sum(g.numel for g in reports[0].layers.values())
    write(tmp_path, [build_report(3, 0)], histograms=False, figures=False)
    tags = load(tmp_path).Tags()
    assert not [t for t in tags["tensors"] if t.startswith("fim_spread")] and not tags["images"]


def test_the_histogram_of_the_diagonal_is_that_of_its_entries(tmp_path):
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    report = fimprobe.measure(net, torch.randn(16, 5), likelihood="categorical", diagonals=True)
    write(tmp_path, [report], figures=False)
    rows = _floats(load(tmp_path).Tensors("fim_spread/i1/log10_diagonal")[0]).view(-1, 3)
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
    events = load(tmp_path)
    assert [e.step for e in events.Scalars("fim/i1/trace")] == [0, 10, 20, 30]
    shown = {t.split("/")[1] for t in events.Tags()["scalars"] if t.startswith("fim_layers/")}
    assert shown == set(before.layers)


def test_a_run_resumed_within_a_second_is_read_in_order(tmp_path, monkeypatch):
    """TensorBoard's names end in a counter, and "10" sorts before "9"."""
    from tensorboard.summary.writer import event_file_writer

    counter = itertools.count(9)
    monkeypatch.setattr(event_file_writer._global_uid, "get", lambda: next(counter))
    write(tmp_path, [build_report(3, n) for n in (0, 1, 2)], figures=False)
    write(tmp_path, [build_report(3, n) for n in (2, 3)], figures=False, purge_step=2)
    assert next(counter) == 11
    assert [e.step for e in load(tmp_path).Scalars("fim/i1/trace")] == [0, 1, 2, 3]


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
        options = {"log_dir": tmp_path, "likelihood": "categorical"}
        with fimprobe.attach(nn.Linear(3, 2), **options) as probe:
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
    assert [e.step for e in load(tmp_path).Scalars("fim/i1/trace")] == [0, 1, 2, 3]
    TensorboardSink(tmp_path, figures=False).close()


def test_a_report_is_on_disk_when_write_returns(tmp_path):
    sink = TensorboardSink(tmp_path, figures=False)
    for step in range(4):
        sink.write(build_report(3, step))
        shown = load(tmp_path).Scalars("fim/i1/trace")
        assert [e.step for e in shown] == list(range(step + 1))
    sink.close()


def test_files_grow_by_the_rule(tmp_path, monkeypatch):
    kept = [n for n in range(1, 10_001) if is_written(n, 100)]
    assert kept[:100] == list(range(1, 101)) and len(kept) <= 100 * (1 + math.log2(100))
    monkeypatch.setattr("fimprobe.sinks.tensorboard.sink.MAX_DENSE_REPORTS", 4)
    monkeypatch.setattr("fimprobe.sinks.tensorboard.sink.MAX_DENSE_PAGES", 2)
    write(tmp_path, [build_report(3, n) for n in range(1, 12)], figures=False)
    events = load(tmp_path)
    assert [e.step for e in events.Scalars("fim/i1/trace")] == [1, 2, 3, 4, 6, 8, 11]
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
    assert not events.Tags()["images"] and "fim/i1/trace" in events.Tags()["scalars"]
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
    room = Room(False, False, True, True)  # reports 4, 5, 6 and, at the end, the last
    write(tmp_path / "later", [build_report(3, n) for n in range(1, 8)], schedule=room)
    images = load(tmp_path / "later").Tags()["images"]
    assert images and [e.step for e in load(tmp_path / "later").Images(images[0])] == [6, 7]
    assert room.asked[:3] == [1.0] * 3 and room.asked[3] == room.taken[0] and len(room.taken) == 2
    write(tmp_path / "never", [build_report(3, n) for n in range(6)], schedule=Room(*[False] * 4))
    events = load(tmp_path / "never")
    assert not events.Tags()["images"]
    assert len(events.Scalars("fim/i1/trace")) == 6 and events.Tensors("fimprobe/advice")


def test_the_time_that_pictures_took_is_asked_for_next(tmp_path):
    room = Room(True, True, True)  # reports 4, 8 and the end
    write(tmp_path, [build_report(3, n) for n in range(9)], schedule=room)
    assert room.asked == [1.0, *room.taken[:2]] and len(room.taken) == 3 and min(room.taken) > 0
