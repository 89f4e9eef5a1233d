"""The chart of Î₁'s variance from labels against Î₂'s: every value, error and start of the records."""

import numpy as np
from matplotlib.colors import to_hex

from fimprobe.plots.style import COLORS, GREY
from fimprobe.plots.variances import SHIFTS, draw_label_variances, draw_variances
from tests.support.reports import build_report

V = {  # variance and standard error of each layer in the last report; variance in the first
    "i1": {"a": (4.0, 1.0, 0.5), "b": (30.0, 2.0, 90.0), "c": (0.2, None, None)},
    "i2": {"a": (2.0, 1.5, 8.0), "b": (0.0, 0.0, 0.0), "c": (None, 5.0, 1.0)},
}


def record(step, variances):
    """A record with these variances and errors, and what the layers' order and names need."""
    layers = {
        name: {
            "numel": 3,
            **{
                key: {"label_variance": of[name][0], "label_variance_error": of[name][1]}
                for key, of in variances.items()
            },
        }
        for name in ("a", "b", "c")
    }
    return {"step": step, "batch_size": 8, "layers": layers, "parameters": {}, "coverage": {}}


def draw():
    first = {key: {n: (v[2], None) for n, v in of.items()} for key, of in V.items()}
    last = record(90, {key: {n: v[:2] for n, v in of.items()} for key, of in V.items()})
    return draw_label_variances([record(0, first), last], last)


def test_marks_bars_and_starts_are_those_of_the_records():
    (axis,) = draw().axes
    for container, (key, shift) in zip(axis.containers, SHIFTS.items(), strict=True):
        known = [(row, v) for row, v in enumerate(V[key].values()) if v[0]]
        marks, _, (bars,) = container
        np.testing.assert_allclose(marks.get_xdata(), [v[0] for _, v in known])
        np.testing.assert_allclose(marks.get_ydata(), [row + shift for row, _ in known])
        for (low, high), (_, (value, error, _)) in zip(
            (segment[:, 0] for segment in bars.get_segments()), known, strict=True
        ):
            spread = 2 * (error or 0.0)
            np.testing.assert_allclose(high, value + spread)
            np.testing.assert_allclose(low, max(value - spread, value / 10))
        faint = [
            tuple(segment[:, 0])
            for lines in axis.collections
            if lines.get_alpha() == 0.3 and to_hex(lines.get_color()[0]).upper() == COLORS[key]
            for segment in lines.get_segments()
        ]
        assert faint == [(start, value) for _, (value, _, start) in known if start]


def test_an_error_bar_that_reaches_zero_ends_with_an_arrow():
    (axis,) = draw().axes
    arrows = {x.get_color(): x.get_xdata().tolist() for x in axis.lines if x.get_marker() == "<"}
    assert arrows == {COLORS["i2"]: [0.2]}  # 2.0 ± 3.0
    assert axis.get_xlim()[0] < 0.2


def at_the_edge(axis):
    """Rows with a mark at the left edge in place of a value: (colour, row)."""
    return [
        (x.get_markeredgecolor(), float(row))
        for x in axis.lines
        if x.get_transform() == axis.get_yaxis_transform()
        for row in x.get_ydata()
    ]


def test_none_and_unknown_are_different_marks_at_the_left_edge():
    (axis,) = draw().axes
    second = SHIFTS["i2"]
    assert at_the_edge(axis) == [(COLORS["i2"], 1 + second), (GREY, 2 + second)]
    legend = [text.get_text() for text in axis.figure.legends[0].get_texts()]
    assert {"none", "unknown"} <= set(legend)


def test_bars_are_missing_because_of_zero_or_because_nobody_knows():
    lost = build_report(5, 0).to_dict()
    lost["layers"]["features.0.conv"]["i1"]["label_variance"] = None
    first, second = draw_variances(lost).axes
    assert at_the_edge(first) == [(GREY, -0.2)]
    assert [row for _, row in at_the_edge(second)] == [3.8]  # the fifth layer is silent
    legend = [text.get_text() for text in first.figure.legends[0].get_texts()]
    assert sorted(legend) == ["bound", "from inputs", "from labels", "none", "unknown"]


def test_one_estimator_alone_is_no_comparison():
    alone = {"i1": {n: v[:2] for n, v in V["i1"].items()}}
    last = record(5, alone)
    assert draw_label_variances([last], last) is None
