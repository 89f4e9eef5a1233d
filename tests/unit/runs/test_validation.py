"""A damaged record is left out with a note: no traceback, and what is readable stays readable."""

import json

import pytest

import fimprobe
from fimprobe.cli.commands import main
from tests.models.small import mlp
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, lambda: mlp(4, 3, 2), estimators=["i1", "i2"])
    return [json.loads(line) for line in (folder / "fimprobe.jsonl").read_text().splitlines()]


def damage(record, path, value):
    """A copy of a record with another value at a path; without it for ``del``."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is del_:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


del_ = object()

VALUES = [del_, None, 3, -1, "<b>", [], {}, True, float("inf"), 10**400, [None], {"a": None}]

PATHS = [
    ("step",), ("draws",), ("batch_size",), ("seconds",), ("likelihood",), ("total",), ("layers",),
    ("parameters",), ("advice",), ("notes",), ("coverage",), ("kinks",), ("sizes",), ("outputs",),
    ("convergence",), ("label_sampling",), ("seen_mass",), ("total", "numel"), ("total", "i1"),
    ("total", "i2"), ("total", "i1", "trace"), ("total", "i1", "rel_error"),
    ("total", "i1", "unknown"), ("total", "i1", "pairs_for_10_percent"),
    ("total", "i1", "one_label_error"), ("total", "i1", "std_error"), ("layers", "0"),
    ("layers", "0", "i1"), ("layers", "0", "i1", "label_variance"), ("layers", "0", "geometry"),
    ("total", "i1", "pairs_error"), ("total", "i1", "covariance_norm"),
]  # fmt: skip


def write(folder, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "fimprobe.jsonl").write_text(text)


def show(folder):
    """Show a record in each way; every failure is a message."""
    statuses = {main(["show", str(folder)]), main(["show", str(folder), str(folder)])}
    statuses.add(main(["show", str(folder), "--html", str(folder / "page.html")]))
    assert len(statuses) == 1
    return statuses.pop()


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_damaged_report_hides_no_other(lines, path, tmp_path, monkeypatch):
    monkeypatch.setattr("fimprobe.runs.html._figures", lambda reports, last: "")  # seconds each
    for value in VALUES:
        write(tmp_path, [*lines[:-1], damage(lines[-1], path, value)])
        rows = fimprobe.read(tmp_path)
        assert rows.reports[: len(lines) - 2] == lines[1:-1]
        assert show(tmp_path) == 0
        page = (tmp_path / "page.html").read_text()
        assert "<b></" not in page


@pytest.mark.parametrize("name", ["model", "config", "first_step", "parameters", "began"])
def test_a_damaged_description_of_the_run_hides_no_report(lines, name, tmp_path, monkeypatch):
    monkeypatch.setattr("fimprobe.runs.html._figures", lambda reports, last: "")
    for value in VALUES:
        write(tmp_path, [damage(lines[0], ("run", name), value), *lines[1:]])
        assert fimprobe.read(tmp_path).reports == lines[1:]
        assert show(tmp_path) == 0
    write(tmp_path, [{"run": 3}, *lines[1:]])
    assert "line 1 is damaged" in fimprobe.read(tmp_path).notes[0]


@pytest.mark.parametrize(
    "line",
    [
        "\0" * 100,
        '{"step": ' + "9" * 5000 + ', "total": {}, "layers": {}}',
        '{"step": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"step": 1e999, "total": {}, "layers": {}}',
        "written by a program",
        "[]",
    ],
    ids=["zeros", "digits", "deep", "infinite", "words", "list"],
)
def test_a_line_of_something_else_hides_no_report(lines, line, tmp_path):
    write(tmp_path, lines[:2])
    path = tmp_path / "fimprobe.jsonl"
    path.write_text(path.read_text() + line + "\n" + json.dumps(lines[2]) + "\n")
    rows = fimprobe.read(tmp_path)
    assert rows.reports == lines[1:3] and len(rows.notes) == 1 and "line 3" in rows.notes[0]


def test_numbers_that_json_does_not_have_are_unknown(lines, tmp_path):
    write(tmp_path, [damage(lines[1], ("total", "i1", "std_error"), float("nan"))])
    assert fimprobe.read(tmp_path).reports[0]["total"]["i1"]["std_error"] is None


def test_only_damaged_records_are_a_message(lines, tmp_path, capsys):
    write(tmp_path, [damage(lines[1], ("draws",), "<script>")])
    assert show(tmp_path) == 1
    assert "without one (line 1 is damaged). Pass another run." in capsys.readouterr().err
