"""What the README shows runs as it is written."""

import re

from tests.support.paths import ROOT


def test_the_readme_examples_run(tmp_path, monkeypatch, capsys):
    """The loop, and the single measurement that follows it, with no names but their own."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:3]
    monkeypatch.chdir(tmp_path)
    exec("".join(block.split("```")[0] for block in blocks), {})
    assert "pairs for 10 %" in capsys.readouterr().out


def test_the_demo_shows_its_point(tmp_path, capsys):
    from fimprobe.cli import main

    assert main(["demo", "--epochs", "8", "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("mlp", "cnn"):
        line = next(x for x in out.splitlines() if x.startswith(f"What it found: as the {name}"))
        told = re.search(r"went from ([\d.,]+) % to ([\d.,]+) %\.", line)
        first, last = (float(share.replace(",", "")) for share in told.groups())
        assert last > 1.5 * first
    assert "tensorboard --logdir" in out
