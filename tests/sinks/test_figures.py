"""Pictures of 3, 12 and 100 layers: what they show, and that no label covers another."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fimprobe.sinks.figures import COLUMNS, Gallery, shorten

sys.path.insert(0, str(Path(__file__).parent))
from reports import make_report  # noqa: E402


def gallery(layers, reports=9):
    made = Gallery()
    for i in range(reports):
        made.remember(make_report(layers, 1000 * i))
    return made


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


@pytest.mark.parametrize("layers", [3, 12, 100])
@pytest.mark.parametrize(
    "picture", ["1_relative_error", "2_variance_and_bound", "3_pairs_needed", "4_diagonal"]
)
def test_no_label_covers_another_or_leaves_the_picture(layers, picture):
    figure = gallery(layers).figures(make_report(layers, 9000))[picture]
    boxes = labels_of(figure)
    assert len(boxes) > 6
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, name
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, name


def test_the_heat_map_holds_the_errors():
    made = gallery(12, reports=4)
    figure = made.figures(make_report(12, 3000))["1_relative_error"]
    shown = figure.axes[1].images[0].get_array()
    want = [[g.i2.rel_error for g in make_report(12, 1000 * i).layers.values()] for i in range(4)]
    np.testing.assert_allclose(shown, np.array(want).T)
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["0", "2,000", "3,000"]


def test_a_long_run_keeps_a_bounded_heat_map():
    made = gallery(3, reports=5 * COLUMNS)
    assert COLUMNS / 2 <= len(made.steps) <= COLUMNS == 120
    assert set(np.diff(made.steps)) == {8000}


def test_marks_stand_where_the_numbers_are():
    report = make_report(12, 0)
    figure = Gallery().figures(report)["3_pairs_needed"]
    first, second = figure.axes[0].collections
    want = [[g.i1.draws_for(0.1), i] for i, g in enumerate(report.layers.values())]
    np.testing.assert_allclose(first.get_offsets(), want)
    assert second.get_label() == "Î₂" and figure.axes[0].lines[0].get_xdata()[0] == 64


def test_without_numbers_there_is_no_picture():
    report = make_report(3, 0, i2=False, known=False)
    made = Gallery()
    made.remember(report)
    assert [name for name, *_ in made.draw(report)] == ["4_diagonal"]


def test_no_global_state_is_touched():
    before = dict(rcParams)
    for _, png, (width, height) in gallery(3).draw(make_report(3, 0)):
        assert png.startswith(b"\x89PNG") and width == 728 and height > 300
    assert dict(rcParams) == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_names_keep_what_tells_layers_apart():
    assert shorten(["only.one"]) == ["only.one"]
    assert shorten(["a.b.c", "a.b.d", "a.b"]) == ["b.c", "b.d", "b"]
    (name, _) = shorten(["x" * 30 + ".end", "y"])
    assert len(name) == 20 and name.endswith("x.end") and name.startswith("…")
