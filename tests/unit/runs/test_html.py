"""The page of a run: its values, its pictures, and that a real browser opens it without a request."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import fimprobe
from fimprobe.cli.commands import main
from fimprobe.report.footnotes import footnotes
from fimprobe.report.format import count_with_error, number, percent, with_error
from fimprobe.report.partial_reports import PREVIEW
from fimprobe.report.table import make_rows
from fimprobe.runs.html import make_page
from fimprobe.sinks.jsonl import JsonlSink
from tests.support.reports import build_report
from tests.support.runs import deep_net, write_run

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its reports, its page."""
    folder = tmp_path_factory.mktemp("a & b <run>")
    reports = write_run(folder, reports=4, estimators=["i1", "i2", "ih"]).history
    page = folder / "page.html"
    assert main(["show", str(folder), "--html", str(page)]) == 0
    return folder, reports, page


def cells(page):
    """All rows of all tables, as texts."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [[unescape(c) for c in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def test_the_page_holds_the_reports_values(run):
    text = run[2].read_text()
    rows = cells(text)
    last = run[1][-1]
    for name, group in {**last.layers, "total": last.total}.items():
        first, second, *_ = (r for r in rows if r[0].split()[0] == name)
        assert first[2:4] == [with_error(e.trace, e.std_error) for e in (group.i1, group.i2)]
        assert first[4:6] == [percent(e.rel_error) for e in (group.i1, group.i2)]
        assert second[1:3] == [percent(e.error_of(inputs=8)) for e in (group.i1, group.i2)]
        assert second[3] == count_with_error(group.i1.pairs_for(0.1), group.i1.pairs_error)
    for report in run[1]:
        row = next(r for r in rows if r[0] == str(report.step) and len(r) == 13)
        for start, estimate in ((1, report.total.i1), (5, report.total.i2), (9, report.total.ih)):
            assert row[start] == with_error(estimate.trace, estimate.std_error)
            assert row[start + 1] == percent(estimate.rel_error)
            assert row[start + 2] == percent(estimate.error_of(inputs=8))
            pairs = count_with_error(estimate.pairs_for(0.1), estimate.pairs_error)
            assert row[start + 3] == pairs
    above, _, folded = unescape(text).partition("<summary>More</summary>")
    for i, sentence in enumerate(last.advice):
        assert f"<li>{sentence}</li>" in (above if i < 3 else folded)
    tiles = re.findall(r"<div class=tile><b>([^<]*)</b>", above)
    total = last.total.i1
    assert tiles[0] == percent(total.rel_error) and tiles[1].endswith(" inputs")
    assert tiles[2:] == [with_error(total.trace, total.std_error)]
    assert f"<b>{percent(last.total.i1.rel_error)}</b>" in text
    for line in footnotes(last.to_dict()):
        assert line in unescape(text)
    assert dict(r for r in rows if len(r) == 2)["1.bias"] == last.coverage["1.bias"]


def test_the_page_tells_how_it_was_measured(run):
    text = unescape(run[2].read_text())
    for name, value in (
        ("Î_H", "Î_H = Hutchinson's estimator: F seen through random directions of the outputs."),
        ("Model", "Sequential, 40 trainable parameters (float32)"),
        ("Likelihood", "Categorical(class_dim=-1) (given)"),
        ("Settings", "estimators [i1, i2, ih]"),
    ):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text


def test_with_exact_labels_page_and_table_hold_the_same_errors(tmp_path):
    (last,) = write_run(tmp_path, reports=1, draws="exact").history
    page = make_page(fimprobe.read(tmp_path))
    first, second, *_ = (row for row in cells(page) if row[0] == "total")
    assert first == list(make_rows(last.to_dict())[-1])
    assert second == list(make_rows(last.to_dict(), view="variances")[-1])
    errors = [first[4], *second[1:3]]
    tiles = re.findall(r"<b>([\d.,]+ %)</b><span>([^<]*)</span>", unescape(page))
    assert tiles == [
        (errors[0], "error of this report, how far off its F is: 8 inputs, exact labels"),
        (errors[1], "error with 1 label, Î₁: 8 inputs, 1 label from the model for each"),
        (errors[2], "error with 1 label, Î₂: 8 inputs, 1 label from the model for each"),
    ]
    assert all(any(value in advice for advice in last.advice[:4]) for value in errors)


def test_what_is_unknown_is_told_where_its_number_would_stand(tmp_path):
    """Three inputs: no error can be told; the reason stands once in the tiles, and below the table."""
    (last,) = write_run(tmp_path, reports=1, size=3).history
    page = unescape(make_page(fimprobe.read(tmp_path)))
    why = last.total.i1.unknown["rel_error"]
    assert why.startswith("3 inputs are too few")
    tiles = re.findall(r"<b>([^<]*)</b><span>([^<]*)</span>", page)
    assert f"{number(last.total.i1.trace)} ± –" in [shown for shown, _ in tiles]
    dashes = [told for shown, told in tiles if shown == "–"]
    assert len(dashes) == 5 and [f"Unknown: {why}" in told for told in dashes] == [True, *[False] * 4]
    assert re.search(rf"– ± of trace F: Î₁, .*error: Î₁, .* everywhere: {re.escape(why)}", page)
    assert not re.search(r"\b(None|nan|inf)\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))


def test_a_number_that_is_unknown_now_is_stated_as_of_its_last_report(tmp_path):
    known, lost = build_report(3, 40), build_report(3, 80, known=False)
    sink = JsonlSink(tmp_path / "fimprobe.jsonl")
    for report in (build_report(3, 0), known, lost):
        sink.write(report)
    sink.close()
    page = unescape(make_page(fimprobe.read(tmp_path)))
    shown, meaning = re.search(
        r"<b>([^<]*)</b><span>(error of this report[^<]*)</span>", page
    ).groups()
    assert shown == "–" and "Unknown: too few inputs" in meaning
    assert meaning.endswith(f"Last known at step 40: {percent(known.total.i1.rel_error)}")


def test_the_last_report_is_the_result_and_what_it_lacks_stands_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fimprobe.runs.html._figures", lambda reports, earlier: "")  # seconds
    reports = [build_report(3, 40 * i, i2=i == 1) for i in range(4)]
    sink = JsonlSink(tmp_path / "fimprobe.jsonl")
    for i, report in enumerate(reports):
        sink.write(replace(report, notes=[] if i == 1 else [f"{PREVIEW}only Î₁ was measured."]))
    sink.close()
    page = unescape(make_page(fimprobe.read(tmp_path)))
    assert "What step 120 says" in page and "Layers at step 120" in page
    assert "steps 0 to 120, 4 reports" in page
    second = reports[1].total.i2
    line = (
        f"Î₂ was last measured at step 40: trace {with_error(second.trace, second.std_error)}, error "
    )
    assert f"<p>{line}{percent(second.rel_error)}, an error of 10 % takes " in page
    total = [row for row in cells(page) if row[0] == "total"]
    assert total[0] == list(make_rows(reports[-1].to_dict())[-1])
    assert total[1] == list(make_rows(reports[1].to_dict(), view="variances")[-1])
    assert re.search(r"<summary>Errors with 1 label, [^<]*, step 40</summary>", page)
    assert f"<b>{percent(reports[-1].total.i1.rel_error)}</b>" in page
    for report in reports:  # those with and without Î₂ have their row over the training
        (row,) = (r for r in cells(page) if r[0] == str(report.step) and len(r) == 9)
        assert row[2] == percent(report.total.i1.rel_error)
        assert (row[5] == "–") == (report.total.i2 is None)
    assert main(["show", str(tmp_path)]) == 0
    summary, head, *lines = capsys.readouterr().out.splitlines()
    assert summary.startswith("fimprobe · step 120 · ") and "error: Î₂" not in head
    assert sum(x.startswith(line) for x in lines) == 1


def test_the_page_of_labels_that_were_not_seen(tmp_path):
    """Every number of F is a dash, none is drawn, and the page says what to do."""
    (last,) = write_run(
        tmp_path, lambda: deep_net(bias=9.0), reports=1, size=40, label_sampling="model"
    ).history
    assert last.seen_mass < 0.5
    page = unescape(make_page(fimprobe.read(tmp_path)))
    for row in make_rows(last.to_dict())[1:]:
        assert set(row[2:3] + row[4:6]) == {"–"} and list(row) in cells(page)
    assert "<svg" not in page
    assert page.count("pass label_sampling='size_biased' or draws='exact'") == 4


def test_the_page_is_one_file_that_asks_for_nothing(run):
    class Links(HTMLParser):
        found, scripts = [], 0

        def handle_starttag(self, tag, attributes):
            self.scripts += tag in ("script", "link", "iframe", "object", "embed")
            names = ("src", "href", "xlink:href", "srcset", "data", "poster", "action")
            self.found += [value for name, value in attributes if name in names]

    text = run[2].read_text()
    links = Links()
    links.feed(text)
    assert links.scripts == 0
    assert links.found  # matplotlib's own references to parts of the picture
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links.found)
    assert not re.search(r"@import|url\((?!#)", text)


def test_pictures_are_whole_and_take_the_colour_of_the_text(run):
    text = run[2].read_text()
    pictures = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(pictures) == 8
    defined, used = [], set()
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label")
        own = {e.get("id") for e in root.iter() if e.tag.endswith(("clipPath", "path"))} - {None}
        used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', picture))
        assert used <= own
        defined += [i for i in own if i in used]
        assert "currentColor" in picture
        assert "#000000" not in picture
    assert len(defined) == len(set(defined))  # a page has one element of each id


def test_values_that_are_missing_leave_their_picture_out(tmp_path):
    from fimprobe.plots.gallery import make_figures

    reports = write_run(tmp_path, reports=1, draws=1, bounds=False, estimators=["i1"]).history
    assert reports[0].total.i1.label_variance is None
    assert "one label for each input" in reports[0].total.i1.unknown["label_variance"]
    titles = [p.title for p in make_figures([reports[0].to_dict()])]
    assert "Trace of the Fisher information" in titles
    starts = ("Norm of the covariance", "Label variance of all", "Variance of one")
    assert not [title for title in titles if title.startswith(starts)]
    assert "Layers at step 0" in make_page(fimprobe.read(tmp_path))


def test_without_matplotlib_there_are_tables_and_the_remedy(run, monkeypatch):
    for name in ("fimprobe.plots.style", "fimprobe.plots.figures", "fimprobe.plots.gallery"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = make_page(fimprobe.read(run[0]))
    assert "<svg" not in text
    assert "pip install 'fimprobe[plots]'" in unescape(text)
    assert number(run[1][-1].total.i1.trace) in text


def browse(page, folder):
    """The DOM that chromium makes of a page, what it says, and the addresses it asked for."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
            "--enable-logging=stderr", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    asked = set(re.findall(r'"url":"((?:http|ws)[^"]+)"', log.read_text()))
    own = (".google.com", ".googleapis.com", ".gstatic.com")  # of the browser's start
    asked = {url for url in asked if not url.split("/")[2].endswith(own)}
    return done.stdout, [x for x in done.stderr.splitlines() if ":CONSOLE" in x], asked


@pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason=f"{CHROMIUM} is not installed")
def test_a_browser_shows_it_and_sends_no_request(run, tmp_path):
    page = tmp_path / "page.html"
    text = run[2].read_text()
    for image, expected in (("", set()), ("http://127.0.0.1:9/x.png", {"http://127.0.0.1:9/x.png"})):
        page.write_text(
            text.replace("</body>", f"<img src='{image}'></body>" if image else "</body>")
        )
        dom, console, asked = browse(page, tmp_path)
        assert "How wrong is the Fisher information?" in dom
        assert dom.count("<svg") == 8
        assert asked == expected  # the second page does ask: the check would see it
        assert console == []
