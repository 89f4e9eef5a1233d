"""The chart of Î₁'s variance from labels against Î₂'s: every value, error and start of the records."""

import numpy as np

from fimprobe.plots.label_variances import SHIFTS, draw_label_variances
from fimprobe.plots.style import COLORS

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
    floor = axis.get_xlim()[0]
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
            np.testing.assert_allclose(low, max(value - spread, floor))
        faint = [x for x in axis.lines if x.get_alpha() == 0.3 and x.get_color() == COLORS[key]]
        drawn = [tuple(x.get_xdata()) for x in faint]
        assert drawn == [(start, value) for _, (value, _, start) in known if start]


def test_an_exact_estimator_stands_at_the_left_edge():
    (axis,) = draw().axes
    floor = axis.get_xlim()[0]
    exact = {
        key: [
            tuple(map(float, point))
            for x in axis.lines
            if x.get_marker() == "|" and x.get_color() == COLORS[key]
            for point in zip(x.get_xdata(), x.get_ydata(), strict=True)
        ]
        for key in SHIFTS
    }
    assert exact == {"i1": [], "i2": [(floor, 1 + SHIFTS["i2"])]}


def test_one_estimator_alone_is_no_comparison():
    alone = {"i1": {n: v[:2] for n, v in V["i1"].items()}}
    last = record(5, alone)
    assert draw_label_variances([last], last) is None
