"""Pictures of 2, 12 and 100 layers: what they show, and that no label covers another."""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fimprobe import pictures
from fimprobe.album import MOST_COLUMNS, Album, condense
from fimprobe.drawing import shorten, to_png, to_svg
from fimprobe.gallery import make_pictures
from fimprobe.pictures import MOST_ROWS

sys.path.insert(0, str(Path(__file__).parent / "sinks"))
from reports import make_report  # noqa: E402


def draw(layers, reports=9, step=9000):
    """All pictures of a made-up run, by name."""
    album = Album()
    for i in range(reports):
        album.remember(make_report(layers, 1000 * i).to_dict())
    return {p.name: p for p in make_pictures(album.records, make_report(layers, step).to_dict())}


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


@pytest.mark.parametrize("layers", [2, 12, 100])
def test_no_label_covers_another_or_leaves_the_picture(layers):
    drawn = draw(layers)
    assert list(drawn) == [
        "errors", "traces", "1_relative_error", "2_variance_and_bound", "3_pairs_needed",
        "4_bound_of_the_matrix", "5_diagonal",
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
    record = make_report(100, 9000).to_dict()
    need = sorted(record["layers"], key=lambda n: -record["layers"][n]["i1"]["draws_for_10_percent"])
    assert MOST_ROWS == 30
    for draw_picture in (pictures.draw_variances, pictures.draw_needs, pictures.draw_bounds):
        shown = [t.get_text() for t in draw_picture(record).axes[0].get_yticklabels()]
        assert shown == shorten([n for n in record["layers"] if n in need[:30]])
    assert "The 30 layers with most need." in draw(100)["3_pairs_needed"].caption
    assert "with most need" not in draw(12)["3_pairs_needed"].caption


def test_the_heat_map_holds_the_errors():
    axes = draw(12, reports=4)["1_relative_error"].figure.axes
    for axis, kind in zip(axes, ("i1", "i2"), strict=False):
        reports = [make_report(12, 1000 * i) for i in range(4)]
        want = [[getattr(g, kind).rel_error for g in r.layers.values()] for r in reports]
        np.testing.assert_allclose(axis.images[0].get_array(), np.array(want).T)
    assert [t.get_text() for t in axes[1].get_xticklabels()] == ["0", "2,000", "3,000"]


@pytest.mark.parametrize(("error", "highest"), [(0.7, 1.0), (9.0, 10.0)])
def test_colours_mean_the_same_in_every_run(error, highest):
    record = make_report(3, 0).to_dict()
    for group in record["layers"].values():
        group["i1"]["rel_error"] = group["i2"]["rel_error"] = error
    axes = pictures.draw_error_map([record]).axes
    assert {axis.images[0].get_clim() for axis in axes[:2]} == {(0.01, highest)}


def test_a_long_run_keeps_a_bounded_heat_map():
    album = Album()
    for i in range(5 * MOST_COLUMNS):
        album.remember(make_report(3, 1000 * i).to_dict())
    assert MOST_COLUMNS / 2 <= len(album.records) <= MOST_COLUMNS == 120
    assert set(np.diff([record["step"] for record in album.records])) == {8000}


def test_condensed_reports_draw_what_whole_ones_do():
    records = [make_report(5, 1000 * i).to_dict() for i in range(4)]
    small = [condense(record) for record in records]
    assert len(str(small)) < len(str(records)) / 3
    for a, b in zip(make_pictures(records), make_pictures(small, records[-1]), strict=True):
        assert a[:3] == b[:3] and to_png(a.figure, "")[0] == to_png(b.figure, "")[0]


def test_lines_and_bands_hold_the_values():
    reports = [make_report(3, 1000 * i) for i in range(4)]
    records = [report.to_dict() for report in reports]
    steps = [report.step for report in reports]
    lines = {x.get_label(): x for x in pictures.draw_errors(records).axes[0].lines}
    axis = pictures.draw_traces(records).axes[0]
    bands = [band.get_paths()[0].vertices for band in axis.collections]
    for kind, name, line, band in zip(("i1", "i2"), ("Î₁", "Î₂"), axis.lines, bands, strict=True):
        totals = [getattr(report.total, kind) for report in reports]
        np.testing.assert_allclose(lines[name].get_ydata(), [e.rel_error for e in totals])
        np.testing.assert_array_equal(lines[name].get_xdata(), steps)
        np.testing.assert_allclose(line.get_ydata(), [e.trace for e in totals])
        for step, e in zip(steps, totals, strict=True):
            ends = band[band[:, 0] == step, 1]
            wide = 2 * e.std_error
            assert [ends.min(), ends.max()] == pytest.approx([e.trace - wide, e.trace + wide])


def test_bars_and_marks_stand_where_the_numbers_are():
    report = make_report(12, 0)
    record, layers = report.to_dict(), report.layers.values()
    axes = pictures.draw_variances(record).axes
    for axis, kind in zip(axes, ("i1", "i2"), strict=True):
        estimates = [getattr(g, kind) for g in layers]
        bars = {c.get_label(): [b.get_x() + b.get_width() for b in c] for c in axis.containers}
        for label, name in (("from labels", "label_variance"), ("from inputs", "input_variance")):
            want = [getattr(e, name) if getattr(e, name) > 0 else np.nan for e in estimates]
            np.testing.assert_allclose(bars[label], want)
        (bounds,) = axis.lines
        np.testing.assert_allclose(bounds.get_xdata(), [e.diagonal_bound for e in estimates])
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert np.isnan(bars["from labels"]).any()  # zeros have no place on a logarithmic axis
    axis = pictures.draw_needs(record).axes[0]
    for marks, kind in zip(axis.collections, ("i1", "i2"), strict=True):
        want = [[getattr(g, kind).draws_for(0.1), i] for i, g in enumerate(layers)]
        np.testing.assert_allclose(marks.get_offsets(), want)
    assert axis.lines[0].get_xdata()[0] == 64 == report.batch_size * report.draws
    for axis, kind in zip(pictures.draw_bounds(record).axes, ("i1", "i2"), strict=True):
        for line, name in zip(axis.lines, ("total_label_variance", "trace_bound"), strict=True):
            np.testing.assert_allclose(
                line.get_xdata(), [getattr(getattr(g, kind), name) for g in layers]
            )
    stairs = pictures.draw_diagonal(record).axes[0].patches
    for steps in stairs:
        assert steps.get_data().values.sum() == sum(g.numel for g in report.parameters.values())


def test_the_sizes_of_the_diagonal_are_drawn_where_they_are_known():
    sizes = [[-7.0, 12.0], [-6.5, 30.0], [-2.0, 1.0]]
    axis = pictures.draw_diagonal(make_report(3, 0).to_dict() | {"sizes": sizes}).axes[0]
    (bars,) = axis.containers
    for bar, (edge, number) in zip(bars, sizes, strict=True):
        assert bar.get_height() == number and bar.get_x() == pytest.approx(10**edge)
        assert bar.get_x() + bar.get_width() == pytest.approx(10 ** (edge + 0.5))
    assert axis.get_xlabel() == "entry of diag F by Î₁"


def test_with_exact_labels_errors_are_those_of_one_drawn_label():
    report = dataclasses.replace(make_report(3, 0), draws=None)
    record = report.to_dict()
    (line, *_) = pictures.draw_errors([record]).axes[0].lines
    grid = pictures.draw_error_map([record]).axes[0].images[0].get_array()
    for value, group in [
        (line.get_ydata()[0], report.total),
        *zip(grid[:, 0], report.layers.values()),
    ]:
        e = group.i1
        pair = e.label_variance + e.input_variance
        assert value == pytest.approx((pair / report.batch_size) ** 0.5 / e.norm, rel=1e-9)
        assert value != pytest.approx(e.rel_error, rel=1e-2)
    (measured, bound) = pictures.draw_bounds(record).axes[0].lines
    layers = report.layers.values()
    np.testing.assert_allclose(measured.get_xdata(), [g.i1.covariance_norm for g in layers])
    np.testing.assert_allclose(bound.get_xdata(), [g.i1.bound for g in layers])
    told = [t.get_text() for t in pictures.draw_needs(record).legends[0].get_texts()]
    assert "measured: 32 inputs, all labels" in told


def test_without_numbers_there_is_no_picture():
    record = make_report(3, 0, i2=False, known=False).to_dict()
    assert [picture.name for picture in make_pictures([record])] == ["traces", "5_diagonal"]


def test_no_global_state_is_touched():
    before = dict(rcParams)
    for picture in draw(3).values():
        png, (width, height) = to_png(picture.figure, picture.title)
        assert png.startswith(b"\x89PNG") and width == 728 and height > 300
        assert to_svg(picture.figure, "x").startswith("<svg ")
    assert dict(rcParams) == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_names_keep_what_tells_layers_apart():
    assert shorten(["only.one"]) == ["only.one"]
    assert shorten(["a.b.c", "a.b.d", "a.b"]) == ["b.c", "b.d", "b"]
    (name, _) = shorten(["x" * 30 + ".end", "y"])
    assert len(name) == 20 and name.endswith("x.end") and name.startswith("…")
