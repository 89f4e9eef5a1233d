"""The table: few columns, the digits that errors allow, whole numbers at any width, short names."""

import re

import pytest

import fimprobe
from fimprobe.report.columns import VIEWS
from fimprobe.report.format import percent, with_error
from fimprobe.report.layer_names import fit_labels, label_layers, shorten_names
from fimprobe.report.record import describe_hidden, rank_layers
from fimprobe.report.table import format_report, format_table, make_rows
from tests.support.reports import build_report

HEAD = (
    "layer", "parameters", "trace F: Î₁", "trace F: Î₂", "error: Î₁", "error: Î₂", "verdict",
)  # fmt: skip


def test_the_default_has_seven_columns_and_one_verdict_a_layer():
    report = build_report(5, 3000)
    head, *rows = make_rows(report.to_dict())
    assert head == HEAD
    by_need = sorted(report.layers.values(), key=lambda group: -group.i1.rel_error)
    groups = [*by_need, report.total]
    for row, group in zip(rows, groups, strict=True):
        assert row[2] == with_error(group.i1.trace, group.i1.std_error)
        assert row[3] == with_error(group.i2.trace, group.i2.std_error)
        trusted = group.i1.rel_error <= 0.1
        inputs = 32 * (group.i1.rel_error / 0.1) ** 2
        assert row[4:6] == (percent(group.i1.rel_error), percent(group.i2.rel_error))
        assert row[6] == ("trusted" if trusted else f"needs {inputs:,.0f} inputs")
    assert make_rows(build_report(5, 0, i2=False).to_dict())[0] == (*HEAD[:3], HEAD[4], HEAD[6])


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_a_table_with_the_meaning_of_its_columns(view):
    report = build_report(3, 0)
    text = report.table(view)
    assert text == format_table(report.to_dict(), view=view)
    assert len(make_rows(report.to_dict(), view=view)[0]) <= (99 if view == "all" else 7)
    for head in make_rows(report.to_dict(), view=view)[0][1:]:
        assert head in text.splitlines()[0]
    assert ("verdict: " in text) == (view in ("errors", "all"))
    assert ("1 label: the error with 1 label" in text) == (view in ("variances", "all"))
    # every head is explained, and with it what the head of this report's errors refers to
    notes = text.rpartition("---\n")[2].splitlines()[1:]
    heads = {head.partition(":")[0] for head in make_rows(report.to_dict(), view=view)[0][1:]}
    names = {"bound/..." if head.startswith("bound/") else head for head in heads - {"parameters"}}
    names |= {"size-biased labels"} if "error" in names else set()
    assert {note.partition(":")[0] for note in notes} == names
    assert ("1 is equality" in text) == (view in ("bounds", "all"))


def test_a_view_that_does_not_exist():
    with pytest.raises(fimprobe.FimprobeError, match="`view` must be one of 'errors', .*got 'x'"):
        build_report(3, 0).table("x")


def test_bounds_that_were_not_measured_leave_a_remedy():
    text = build_report(3, 0, known=False).table("bounds")
    assert "No bound was measured: pass bounds=True" in text


@pytest.mark.parametrize("layers", [3, 300])
@pytest.mark.parametrize("view", VIEWS)
def test_no_number_is_cut_at_any_width(layers, view):
    record = build_report(layers, 8000).to_dict()
    numbers = {cell for row in make_rows(record, 20, view=view)[1:] for cell in row[1:]}
    for width in (60, 61, 72, 80, 100, 120, 200):
        lines = format_table(record, 20, view=view, width=width).splitlines()
        assert max(map(len, lines)) <= width
        head, _, *rows = lines[: lines.index(lines[1], 2)]
        for row in rows:
            assert set(re.split(r"\s{2,}", row)[1:]) <= numbers
        hidden = re.search(r"a wider terminal also shows (.*)\)", " ".join(x.strip() for x in lines))
        heads = set(re.split(r"\s{2,}", head)) | set(hidden[1].split(", ") if hidden else ())
        assert heads == set(make_rows(record, 20, view=view)[0])
    if view == "errors":  # the verdict stays, traces go first
        assert "verdict" in format_table(record, 20, width=60).splitlines()[0]
        assert "trace F: Î₁" in format_table(record, 20, width=80).splitlines()[0]


def test_the_advice_is_wrapped_in_a_terminal_only():
    record = build_report(3, 0).to_dict() | {"advice": ["word " * 40]}
    assert max(map(len, format_report(record, width=60).splitlines())) <= 60
    assert "word " * 39 in format_report(record)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (13.04, 1.49, "13.0 ± 1.5"),
        (0.5, 2.11, "0.5 ± 2.1"),
        (1.91, 0.0279, "1.910 ± 0.028"),
        (9.96, 0.996, "10.0 ± 1.0"),
        (99_000, 1_000, "99,000 ± 1,000"),
        (-3.2, 1.0, "-3.2 ± 1.0"),
        (2e7, 3.14e6, "(2.00 ± 0.31)e7"),
        (0.0, 0.25, "0.00 ± 0.25"),
        (1e-30, 1e-31, "(1.00 ± 0.10)e-30"),
    ],
)
def test_digits_that_the_error_allows(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize("seed", range(20))
def test_value_and_error_are_rounded_to_a_tenth_of_the_error(seed):
    value, error = 10 ** (seed - 10.3), 10 ** (seed - 11.1)
    text = with_error(value, error).replace(",", "")
    match = re.fullmatch(r"\(?(-?[\d.]+) ± ([\d.]+)\)?(?:e(-?\d+))?", text)
    scale = 10.0 ** int(match[3] or 0)
    assert abs(float(match[1]) * scale - value) <= 0.0501 * error
    assert float(match[2]) * scale == pytest.approx(error, rel=0.05)


def test_names_keep_what_distinguishes_them():
    assert shorten_names(["only.one"]) == ["only.one"]
    assert shorten_names(["a.b.c", "a.b.d", "a.b"]) == ["b.c", "b.d", "b"]
    names = [
        f"bert.encoder.layer.{i}.{end}"
        for i in range(12)
        for end in (
            "attention.self.query", "attention.self.key", "attention.output.dense",
            "attention.self.value", "attention.output.LayerNorm", "intermediate.dense",
            "output.dense", "output.LayerNorm",
        )
    ]  # fmt: skip
    names += [f"bert.embeddings.{end}_embeddings" for end in ("token_type", "position", "word")]
    names += ["bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier"]
    short = shorten_names(names)
    assert len(set(short)) == len(names)
    assert short[0] == "layer.0 … query" and short[-1] == "classifier"
    for width in range(16, 36):  # those of tables from 60 columns on
        fitted = fit_labels([*short, "layer", "total"], width)
        assert len(set(fitted)) == len(names) + 2 and max(map(len, fitted)) <= width
    twice = [f"{side}.layers.3.self_attention.query" for side in ("encoder", "decoder")]
    assert len(set(shorten_names(twice))) == 2


def test_a_number_gets_the_class_of_its_layer():
    record = {
        "layers": {"0": {}, "10": {}, "head": {}},
        "coverage": {
            "0.weight": "autograd: Conv2d rule", "10.bias": "autograd: Linear rule",
            "head.weight": "autograd: Linear rule",
        },
    }  # fmt: skip
    assert list(label_layers(record).values()) == ["0 Conv2d", "10 Linear", "head"]
    assert list(label_layers({"layers": {"0": {}}}).values()) == ["0"]  # an old record


def test_rows_are_in_the_order_of_the_need_that_is_shown():
    """Unknown first, zero last; the footer names what is hidden."""
    record = build_report(6, 3000).to_dict()
    names = list(record["layers"])
    record["layers"][names[3]]["i1"]["rel_error"] = None
    record["layers"][names[1]]["i1"] |= {"rel_error": None, "trace": 0.0, "norm": 0.0}
    needs = {name: group["i1"]["rel_error"] for name, group in record["layers"].items()}
    order = sorted(needs, key=lambda name: -(needs[name] or 0.0))
    order = [names[3], *(name for name in order if name not in (names[1], names[3])), names[1]]
    assert [name for name, _ in rank_layers(record, None)] == order
    rows = make_rows(record, 2)[1:]
    assert [row[0] for row in rows] == [*map(label_layers(record).get, order[:2]), "total"]
    assert "(4 layers with the smallest need are not shown: --top 6)" in format_table(record, 2)
    for name in (names[0], names[5]):
        record["layers"][name]["i1"]["rel_error"] = None
    assert describe_hidden(record, 2) == "4 layers are not shown, 1 of unknown need"
    for group in record["layers"].values():
        group["i1"] |= {"rel_error": None, "trace": 1.0}
    assert describe_hidden(record, 2) == "the first 2 of 6 layers, in the model's order"
    assert describe_hidden(record, 6) == ""


def test_a_line_states_why_both_estimators_agree():
    report = build_report(3, 0)
    record = report.to_dict()
    assert "agree in each row" not in format_table(record)
    for group in (record["total"], *record["layers"].values()):
        group["i2"] = group["i1"]
    assert "Î₁ and Î₂ agree in each row" in format_table(record)
    assert "agree" not in format_table(record, view="bounds")
    record["total"]["i2"] = record["total"]["i2"] | {"rel_error": None}
    assert "agree in each row" not in format_table(record)
