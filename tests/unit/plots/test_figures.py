"""Pictures of 2, 12 and 100 layers: what they show, and that no label covers another."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import fimprobe
from fimprobe.plots import figures as pictures
from fimprobe.plots.gallery import make_figures
from fimprobe.plots.history import MAX_COLUMNS, PlotHistory, compact
from fimprobe.plots.layers import MAX_ROWS
from fimprobe.plots.style import COLORS, GREY, to_png, to_svg
from fimprobe.plots.variances import draw_variances
from fimprobe.report.format import percent
from fimprobe.report.layer_names import label_layers
from tests.support.reports import build_report


def draw(layers, reports=9, step=9000):
    """All pictures of a made-up run, by name."""
    album = PlotHistory()
    for i in range(reports):
        album.remember(build_report(layers, 1000 * i).to_dict())
    return {p.name: p for p in make_figures(album.records, build_report(layers, step).to_dict())}


def labels_of(figure):
    """Boxes of every text that is shown, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, texts = canvas.get_renderer(), [*figure.texts]
    if figure._suptitle is not None:
        texts.append(figure._suptitle)
    for legend in figure.legends:
        texts += legend.get_texts()
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        for one, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            low, high = sorted((low, high))
            texts += [
                t.label1 if one is axis.xaxis or one.get_ticks_position() == "left" else t.label2
                for t in one.get_major_ticks()
                if low <= t.get_loc() <= high
            ]
    found = {id(t): t for t in texts if t.get_visible() and t.get_text()}
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found.values()]


@pytest.mark.parametrize("layers", [2, pytest.param(12, marks=pytest.mark.long), 100])
def test_no_label_covers_another_or_leaves_the_picture(layers):
    drawn = draw(layers)
    assert list(drawn) == [
        "1_error", "2_trace", "3_error_by_layer", "4_variance_and_bound",
        "4b_labels_by_estimator", "5_pairs_needed",
        "6_bound_of_the_matrix", "7_diagonal", "8_error_by_confidence", "9_convergence",
    ]  # fmt: skip
    for name, picture in drawn.items():
        to_png(picture.figure, picture.title)
        figure, boxes = picture.figure, labels_of(picture.figure)
        assert picture.title in [text for text, _ in boxes]
        assert len(boxes) > 6
        for (a, one), (b, other) in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), (name, a, b)
        for text, box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1, (name, text)
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (name, text)


def test_bars_are_for_the_layers_that_need_most_each_with_its_name():
    record = build_report(100, 9000).to_dict()
    need = sorted(record["layers"], key=lambda n: -record["layers"][n]["i1"]["pairs_for_10_percent"])
    assert MAX_ROWS == 30
    for draw_picture in (draw_variances, pictures.draw_needs, pictures.draw_bounds):
        shown = [t.get_text() for t in draw_picture(record).axes[0].get_yticklabels()]
        labels = label_layers(record)
        assert shown == [labels[n] for n in record["layers"] if n in need[:30]]
    caption = draw(100)["5_pairs_needed"].caption
    assert caption.endswith("70 layers with the smallest need are not shown.")
    assert "not shown" not in draw(12)["5_pairs_needed"].caption


def dashed(axis, key):
    """The thin line of an estimator with one label for each input."""
    (line,) = (x for x in axis.lines if x.get_ls() == "--" and x.get_color() == COLORS[key])
    return line


def one_label(e, inputs=32):
    """√((V_x + V_y)/N)/‖diag F‖."""
    return ((e.label_variance + e.input_variance) / inputs) ** 0.5 / e.norm


def test_the_heat_map_holds_the_errors():
    axes = draw(12, reports=4)["3_error_by_layer"].figure.axes
    for axis, kind in zip(axes, ("i1", "i2"), strict=False):
        reports = [build_report(12, 1000 * i) for i in range(4)]
        want = [[one_label(getattr(g, kind)) for g in r.layers.values()] for r in reports]
        np.testing.assert_allclose(axis.images[0].get_array(), np.array(want).T)
    assert [t.get_text() for t in axes[1].get_xticklabels()] == ["0", "2,000", "3,000"]


@pytest.mark.parametrize(("error", "highest"), [(0.7, 1.0), (9.0, 10.0)])
def test_colours_mean_the_same_in_every_run(error, highest):
    record = build_report(3, 0).to_dict()
    for group in record["layers"].values():
        group["i1"]["one_label_error"] = group["i2"]["one_label_error"] = error
    axes = pictures.draw_error_map([record]).axes
    assert {axis.images[0].get_clim() for axis in axes[:2]} == {(0.01, highest)}


def test_errors_with_one_label_are_for_the_inputs_of_the_last_report():
    records = [build_report(3, 1000 * i).to_dict() for i in range(2)]
    records[1]["batch_size"] = 8  # a last batch that is smaller
    line = dashed(pictures.draw_errors(records).axes[0], "i1")
    grid = pictures.draw_error_map(records).axes[0].images[0].get_array()
    groups = [record["total"] for record in records], [record["layers"]["0"] for record in records]
    for values, (first, last) in zip((line.get_ydata(), grid[0]), groups, strict=True):
        errors = [group["i1"]["one_label_error"] for group in (first, last)]
        np.testing.assert_allclose(values, [2 * errors[0], errors[1]])


@pytest.mark.parametrize("known", [True, False])
def test_grey_is_explained_where_it_is_drawn(known):
    records = [build_report(3, 0).to_dict(), build_report(3, 1, known=known).to_dict()]
    legends = pictures.draw_error_map(records).legends
    words = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert words == ([] if known else ["unknown"])


def test_an_estimator_measured_once_leaves_no_empty_panel():
    records = [build_report(3, 1000 * i, i2=i == 0).to_dict() for i in range(3)]
    names = [axis.get_title() for axis in pictures.draw_error_map(records).axes]
    assert "Î₁" in names and "Î₂" not in names
    names = [axis.get_title() for axis in pictures.draw_error_map(records[:1]).axes]
    assert "Î₁" in names and "Î₂" in names


@pytest.mark.parametrize(("layers", "labels"), [(30, 30), (31, 16)])
def test_each_of_up_to_30_rows_has_its_name(layers, labels):
    axis = pictures.draw_error_map([build_report(layers, 0).to_dict()]).axes[0]
    assert len(axis.get_yticklabels()) == labels


def test_captions_name_the_step_and_the_error_of_f():
    record = build_report(3, 2000).to_dict()
    drawn_of_one = {p.name: p for p in make_figures([record])}
    over_steps = ("2_trace", "3_error_by_layer")
    for name, picture in drawn_of_one.items():
        assert picture.title.endswith(", step 2,000") == (name not in over_steps), name
    caption = drawn_of_one["9_convergence"].caption
    assert f"of all entries, is {percent(record['total']['i1']['rel_error'])}." in caption
    record["total"]["i1"]["rel_error"] = 0.34
    (figure,) = make_figures([record], names=["9_convergence"])
    assert "The error of F, of all entries, is larger: 34 %." in figure.caption
    assert "first report" not in drawn_of_one["4b_labels_by_estimator"].caption
    assert "first report" in draw(3)["4b_labels_by_estimator"].caption


def test_a_long_run_keeps_a_bounded_heat_map():
    album = PlotHistory()
    for i in range(5 * MAX_COLUMNS):
        album.remember(build_report(3, 1000 * i).to_dict())
    assert MAX_COLUMNS / 2 <= len(album.records) <= MAX_COLUMNS == 120
    assert set(np.diff([record["step"] for record in album.records])) == {8000}


def test_condensed_reports_draw_what_whole_ones_do():
    records = [build_report(5, 1000 * i).to_dict() for i in range(4)]
    small = [compact(record) for record in records]
    assert len(str(small)) < len(str(records)) / 3
    for a, b in zip(make_figures(records), make_figures(small, records[-1]), strict=True):
        assert (a.name, a.title, a.caption) == (b.name, b.title, b.caption)
        assert to_png(a.figure, "")[0] == to_png(b.figure, "")[0]


def test_lines_and_bands_hold_the_values():
    reports = [build_report(3, 1000 * i) for i in range(4)]
    records = [report.to_dict() for report in reports]
    steps = [report.step for report in reports]
    errors, axis = pictures.draw_errors(records).axes[0], pictures.draw_traces(records).axes[0]
    lines = {x.get_label(): x for x in errors.lines}
    bars = [x.get_segments() for x in axis.collections]
    for kind, name, line, bar in zip(("i1", "i2"), ("Î₁", "Î₂"), axis.lines, bars, strict=True):
        totals = [getattr(report.total, kind) for report in reports]
        # thick: the number that a report states
        np.testing.assert_allclose(lines[name].get_ydata(), [e.rel_error for e in totals])
        assert lines[name].get_lw() > dashed(errors, kind).get_lw()
        np.testing.assert_allclose(dashed(errors, kind).get_ydata(), [one_label(e) for e in totals])
        for x in (lines[name], dashed(errors, kind), line):
            np.testing.assert_array_equal(x.get_xdata(), steps)
        np.testing.assert_allclose(line.get_ydata(), [e.trace for e in totals])
        for segment, step, e in zip(bar, steps, totals, strict=True):
            wide = 2 * e.std_error
            want = [[step, e.trace - wide], [step, e.trace + wide]]
            np.testing.assert_allclose(segment, want)


def test_reports_of_unknown_error_are_marked_and_the_axis_reaches_them():
    records = [build_report(3, 1000 * i, known=i < 2).to_dict() for i in range(4)]
    axis = pictures.draw_errors(records).axes[0]
    (marks,) = (x for x in axis.lines if x.get_label() == "unknown")
    assert list(marks.get_xdata()) == [2000, 3000] and axis.get_xlim()[1] > 3000
    assert (marks.get_markerfacecolor(), marks.get_markeredgecolor()) == ("none", GREY)
    known = pictures.draw_errors(records[:2]).axes[0]
    assert "unknown" not in [x.get_label() for x in known.lines]


def test_ticks_of_errors_are_round_and_enclose_them():
    records = [build_report(3, 0).to_dict(), build_report(3, 1000).to_dict()]
    for record, errors in zip(records, ((0.343, 0.399), (0.526, 0.11)), strict=True):
        for key, error in zip(("i1", "i2"), errors, strict=True):
            record["total"][key] |= {"rel_error": error, "one_label_error": error}
    axis = pictures.draw_errors(records).axes[0]
    (low, high) = axis.get_ylim()
    shown = [x for x in axis.get_yticks() if low <= x <= high]
    assert shown == [0.1, 0.2, 0.5, 1.0] and low == 0.1


def test_bars_and_marks_stand_where_the_numbers_are():
    report = build_report(12, 0)
    record, layers = report.to_dict(), report.layers.values()
    axes = draw_variances(record).axes
    for axis, kind in zip(axes, ("i1", "i2"), strict=True):
        estimates = [getattr(g, kind) for g in layers]
        bars = {c.get_label(): [b.get_x() + b.get_width() for b in c] for c in axis.containers}
        for label, name in (("from labels", "label_variance"), ("from inputs", "input_variance")):
            want = [getattr(e, name) if getattr(e, name) > 0 else np.nan for e in estimates]
            np.testing.assert_allclose(bars[label], want)
        (bounds,) = (x for x in axis.lines if x.get_label() == "bound")
        np.testing.assert_allclose(bounds.get_xdata(), [e.diagonal_bound for e in estimates])
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert np.isnan(bars["from labels"]).any()  # zeros have no place on a logarithmic axis
    axis = pictures.draw_needs(record).axes[0]
    for marks, kind in zip(axis.collections, ("i1", "i2"), strict=True):
        want = [[100 * one_label(getattr(g, kind), 1) ** 2, i] for i, g in enumerate(layers)]
        np.testing.assert_allclose(marks.get_offsets(), want)
    assert axis.lines[0].get_xdata()[0] == 32 == report.batch_size
    for axis, kind in zip(pictures.draw_bounds(record).axes, ("i1", "i2"), strict=True):
        for line, name in zip(axis.lines[:2], ("total_label_variance", "trace_bound"), strict=True):
            np.testing.assert_allclose(
                line.get_xdata(), [getattr(getattr(g, kind), name) for g in layers]
            )
    stairs = pictures.draw_diagonal(record).axes[0].patches
    for steps in stairs:
        assert steps.get_data().values.sum() == sum(g.numel for g in report.parameters.values())


def test_the_sizes_of_the_diagonal_are_drawn_where_they_are_known():
    sizes = [[-7.0, 12.0], [-6.5, 30.0], [-2.0, 1.0]]
    axis = pictures.draw_diagonal(build_report(3, 0).to_dict() | {"sizes": sizes}).axes[0]
    (bars,) = axis.containers
    for bar, (edge, number) in zip(bars, sizes, strict=True):
        assert bar.get_height() == number and bar.get_x() == pytest.approx(10**edge)
        assert bar.get_x() + bar.get_width() == pytest.approx(10 ** (edge + 0.5))
    assert axis.get_xlabel() == "entry of the diagonal of F, by Î₁"


def test_with_exact_labels_errors_are_those_of_one_drawn_label():
    report = dataclasses.replace(build_report(3, 0), draws=None, label_sampling="exact")
    record = report.to_dict()
    line = dashed(pictures.draw_errors([record]).axes[0], "i1")
    grid = pictures.draw_error_map([record]).axes[0].images[0].get_array()
    for value, group in [
        (line.get_ydata()[0], report.total),
        *zip(grid[:, 0], report.layers.values()),
    ]:
        assert value == pytest.approx(one_label(group.i1), rel=1e-9)
        assert value != pytest.approx(group.i1.rel_error, rel=1e-2)
    (measured, bound, *_) = pictures.draw_bounds(record).axes[0].lines
    layers = report.layers.values()
    np.testing.assert_allclose(measured.get_xdata(), [g.i1.covariance_norm for g in layers])
    np.testing.assert_allclose(bound.get_xdata(), [g.i1.bound for g in layers])
    words = [t.get_text() for t in pictures.draw_needs(record).legends[0].get_texts()]
    assert "32 pairs: 1 label per input" in words
    for record, quantity in (
        (record, "Norm of the covariance over labels"),
        (record | {"draws": 2}, "Label variance of all entries"),
    ):
        (bounds,) = make_figures([record], names=["6_bound_of_the_matrix"])
        assert bounds.title == f"{quantity}, and its bound, step 0"


def test_the_errors_by_confidence_are_those_of_the_reports():
    reports = [build_report(3, 1000 * i, known=i != 2) for i in range(5)]
    axis = pictures.draw_errors_by_confidence([r.to_dict() for r in reports]).axes[0]
    for marks, kind, name in zip(axis.collections, ("i1", "i2"), ("Î₁", "Î₂"), strict=True):
        want = [
            (r.outputs.fisher_trace, one_label(getattr(r.total, kind)))
            for r in reports
            if r.step != 2000
        ]
        np.testing.assert_allclose(drawn(marks), want)
        assert marks.get_label() == f"1 label: {name}"
    assert axis.get_xscale() == axis.get_yscale() == "log"
    left, right = axis.get_xlim()
    assert left > right and "confident to the right" in axis.get_xlabel()


@pytest.mark.parametrize(
    ("steps", "drawn"), [((0, 1, 2), 0), ((0, 1, 2, 3), 0), ((0, 1, 2, 2000), 1)]
)
def test_confidence_is_an_axis_where_it_changes(steps, drawn):
    """Four reports are needed, and a trace of the output Fisher that halves."""
    records = [build_report(3, step).to_dict() for step in steps]
    assert (pictures.draw_errors_by_confidence(records) is not None) == drawn
    lost = [record | {"outputs": None} for record in records[:1]] + records[1:]
    assert pictures.draw_errors_by_confidence(lost) is None


def drawn(marks):
    """The points that are there to be seen."""
    offsets = np.ma.filled(np.ma.array(marks.get_offsets(), dtype=float), np.nan)
    return offsets[np.isfinite(offsets).all(1)]


def test_the_convergence_holds_the_groups_and_the_line_through_the_error():
    report = build_report(3, 0)
    axis = pictures.draw_convergence(report.to_dict()).axes[0]
    groups, whole = axis.collections
    np.testing.assert_allclose(groups.get_offsets(), report.convergence)
    e = report.total.i1
    np.testing.assert_allclose(whole.get_offsets(), [[32, e.std_error / e.trace]])
    assert whole.get_label() == "trace, this report"
    line = next(x for x in axis.lines if x.get_label() == "falls as 1/√inputs")
    for inputs, error in zip(*line.get_data(), strict=True):
        assert error == pytest.approx(e.std_error / e.trace * (32 / inputs) ** 0.5)
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert pictures.draw_convergence(build_report(3, 0, known=False).to_dict()) is None
    short = dataclasses.replace(report, convergence=report.convergence[:1])
    assert pictures.draw_convergence(short.to_dict()) is None


def test_a_measured_convergence_is_that_of_the_inputs_traces(tmp_path):
    """Groups of 1, 2 and 4 of 16 inputs, from single measurements of each input."""
    torch.manual_seed(2)
    net, x = nn.Linear(5, 3), torch.randn(16, 5)
    options = {"likelihood": "categorical", "draws": "exact", "estimators": ("i1",)}
    record = fimprobe.measure(net, x, **options).to_dict()
    traces = np.array([fimprobe.measure(net, row[None], **options).total.i1.trace for row in x])
    want = [(n, traces.reshape(-1, n).mean(1).std(ddof=1) / traces.mean()) for n in (1, 2, 4)]
    assert record["convergence"] == [[n, pytest.approx(e, rel=1e-4)] for n, e in want]
    (groups, _) = pictures.draw_convergence(record).axes[0].collections
    np.testing.assert_allclose(groups.get_offsets(), want, rtol=1e-4)


def test_traces_of_unknown_error_are_hollow():
    reports = [build_report(3, 1000 * i, known=i % 2 == 0) for i in range(4)]
    axis = pictures.draw_traces([r.to_dict() for r in reports]).axes[0]
    lines = {x.get_label(): x for x in axis.lines if x.get_label()[0] != "_"}
    hollow = [x for x in axis.lines if x.get_label()[0] == "_"]
    for name, marks, kind in zip(("Î₁", "Î₂"), hollow, ("i1", "i2"), strict=True):
        seen = np.isfinite(lines[name].get_ydata())
        np.testing.assert_array_equal(seen, [True, False, True, False])
        assert marks.get_markerfacecolor() == "none"
        np.testing.assert_array_equal(marks.get_xdata(), [1000, 3000])
        want = [getattr(reports[i].total, kind).trace for i in (1, 3)]
        np.testing.assert_allclose(marks.get_ydata(), want)


def test_without_numbers_there_is_no_picture():
    record = build_report(3, 0, i2=False, known=False).to_dict()
    assert [picture.name for picture in make_figures([record])] == ["2_trace", "7_diagonal"]


def confident():
    """A net that is sure of its classes, and 40 inputs; labels from the model do not show F."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        net[2].bias[0] += 9
    return net, torch.randn(40, 6)


def test_labels_that_were_not_seen_leave_no_picture_of_f():
    net, x = confident()
    options = {"label_sampling": "model", "second_order": {"probes": 2}}
    report = fimprobe.measure(net, x, likelihood="categorical", **options)
    assert report.seen_mass < 0.5 and report.total.i1.trace is None and not report.sizes
    record = report.to_dict()
    assert list(make_figures([record])) == []
    # beside a report that knows them, only that one is drawn
    known = fimprobe.measure(net, x, likelihood="categorical", draws="exact", step=5).to_dict()
    for picture in make_figures([record, known], record):
        for axis in picture.figure.axes:
            for line in axis.lines:
                if line.get_label() in ("Î₁", "Î₂"):
                    seen = np.isfinite(np.array(line.get_ydata(), dtype=float))
                    np.testing.assert_array_equal(np.array(line.get_xdata())[seen], [5])


@pytest.mark.parametrize("name", ["confident", "unseen", "three"])
def test_what_is_unknown_is_not_drawn(name):
    """Every number in a picture is one of the record; the others are gaps."""
    net, x = confident()
    options = {
        "confident": {},
        "unseen": {"label_sampling": "model"},
        "three": {"draws": "exact"},
    }[name]
    size = 3 if name == "three" else 40
    report = fimprobe.measure(net, x[:size], likelihood="categorical", **options)
    record = report.to_dict()
    layers = list(record["layers"].values())
    unknown = {
        (kind, field)
        for kind in ("i1", "i2")
        for field in ("std_error", "one_label_error", "pairs_for_10_percent", "label_variance")
        if all(g[kind][field] is None for g in [record["total"], *layers])
    }
    if name == "three":
        assert {(k, f) for k in ("i1", "i2") for f in ("std_error", "one_label_error")} <= unknown
    for draw_picture, fields in (
        (pictures.draw_error_map, ("one_label_error",)),
        (pictures.draw_needs, ("pairs_for_10_percent",)),
    ):
        figure = draw_picture([record] if draw_picture is pictures.draw_error_map else record)
        kinds = [k for k in ("i1", "i2") if any((k, f) not in unknown for f in fields)]
        assert (figure is None) == (not kinds or not positive(layers, fields[0]))
    needs = pictures.draw_needs(record)
    if needs is not None:
        for marks in needs.axes[0].collections:
            kind = {"Î₁": "i1", "Î₂": "i2"}[marks.get_label()]
            want = [
                [max(g[kind]["pairs_for_10_percent"], 1), i]
                for i, g in enumerate(layers)
                if g[kind]["pairs_for_10_percent"] is not None and g[kind]["pairs_for_10_percent"] > 0
            ]
            np.testing.assert_allclose(drawn(marks), want)
    variances = draw_variances(record)
    for axis in [] if variances is None else variances.axes:
        kind = {"Î₁": "i1", "Î₂": "i2"}[axis.get_title()]
        for bars in axis.containers:
            field = {"from labels": "label_variance", "from inputs": "input_variance"}[
                bars.get_label()
            ]
            for bar, group in zip(bars, layers, strict=True):
                value, end = group[kind][field], bar.get_x() + bar.get_width()
                if value is None or value <= 0:
                    assert np.isnan(end)
                else:
                    assert end == pytest.approx(value)
    assert (pictures.draw_convergence(record) is None) == (record["total"]["i1"]["std_error"] is None)
    for picture in make_figures([record]):
        to_png(picture.figure, picture.title)


def positive(layers, field):
    return any((g[kind][field] or 0) > 0 for g in layers for kind in ("i1", "i2"))


OLD = {"pairs_for_10_percent": "draws_for_10_percent"}
NEW = ("label_sampling", "seen_mass", "outputs", "convergence")


def test_records_of_older_versions_are_drawn():
    def old(thing):
        if not isinstance(thing, dict):
            return thing
        gone = ("one_label_error", "pairs_error", "unknown", "effective_inputs", *NEW)
        return {OLD.get(k, k): old(v) for k, v in thing.items() if k not in gone}

    records = [build_report(3, 1000 * i).to_dict() for i in range(4)]
    new = {p.name: p for p in make_figures(records)}
    found = {p.name: p for p in make_figures([old(r) for r in records])}
    assert set(new) - set(found) == {"8_error_by_confidence", "9_convergence"}
    for name, picture in found.items():
        assert to_png(picture.figure, "")[0] == to_png(new[name].figure, "")[0], name


def test_no_global_state_is_touched():
    before = dict(rcParams)
    for picture in draw(3).values():
        png, (width, height) = to_png(picture.figure, picture.title)
        assert png.startswith(b"\x89PNG") and width == 700 and height > 300
        assert to_svg(picture.figure, "x").startswith("<svg ")
    assert dict(rcParams) == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_one_report_is_one_point():
    record = build_report(3, 7).to_dict()
    for draw_picture in (pictures.draw_errors, pictures.draw_traces):
        axis = draw_picture([record]).axes[0]
        points = [line for line in axis.lines if line.get_label() in ("Î₁", "Î₂")]
        assert [list(line.get_xdata()) for line in points] == [[7], [7]]
        assert min(line.get_markersize() for line in points) > 5
        assert [text.get_text() for text in axis.get_xticklabels()] == ["7"]
