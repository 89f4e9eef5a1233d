"""What the README shows runs as it is written, and prints what it shows."""

import re

import pytest

from tests.support.fresh_process import run_fresh
from tests.support.paths import ROOT


def run_blocks(page, count, tmp_path):
    """What the first Python blocks of a page print, with the report at the end."""
    blocks = page.read_text().split("```python\n")[1 : count + 1]
    code = "".join(block.split("```")[0] for block in blocks) + "\nprint(report)\n"
    done = run_fresh(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def assert_same_table(shown, printed):
    """The lines are those that were printed; numbers may differ in their last digits."""
    start = max(i for i, line in enumerate(printed) if line == shown[0])
    for line, actual in zip(shown, printed[start:], strict=False):
        if set(line) == {"-"}:
            assert set(actual) == {"-"}
            continue
        for cell, other in zip(cells(line), cells(actual), strict=True):
            numbers, others = (re.findall(r"\d[\d,]*\.?\d*", text) for text in (cell, other))
            assert re.sub(r"[\d.,]+", "", cell) == re.sub(r"[\d.,]+", "", other)
            for a, b in zip(numbers, others, strict=True):
                a, b = float(a.replace(",", "")), float(b.replace(",", ""))
                assert abs(a - b) <= max(0.1 * abs(b), 1e-9), (cell, other)


@pytest.mark.parametrize(
    ("name", "blocks"), [("README.md", 2), ("docs/index.md", 1), ("docs/tutorial.md", 2)]
)
def test_a_printed_table_is_what_the_printed_code_prints(name, blocks, tmp_path):
    page = ROOT / name
    printed = run_blocks(page, blocks, tmp_path).splitlines()
    (table,) = (
        block.split("```")[0].splitlines()
        for block in page.read_text().split("```text\n")[1:]
        if block.startswith("layer ")
    )
    assert_same_table(table, printed)


def test_the_demo_ends_with_its_story_and_opens_its_pages(tmp_path, capsys, monkeypatch):
    from fimprobe.cli import main

    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.setattr("fimprobe.cli.demo.REPORTS", 5)  # the last at step 180, as of 20
    assert main(["demo", "--epochs", "8", "--log-dir", str(tmp_path), "--open"]) == 0
    out = capsys.readouterr().out
    assert "tensorboard --logdir" in out
    assert [url.rpartition("/")[2] for url in opened] == ["mlp.html", "cnn.html"]
    learned, drawn, exact = out.splitlines()[-3:]
    assert learned.startswith("Both networks learned: the mlp has 9")
    number = r"([\d.,]+) %"
    for name in ("mlp", "cnn"):
        match = re.search(rf"from {number} to {number} \({name}\)", drawn)
        first, last = (float(share.replace(",", "")) for share in match.groups())
        assert last > 1.5 * first
        assert float(re.search(rf"{number} \({name}\)", exact)[1]) < last
    (tmp_path / "out.txt").write_text(out)
