"""What the README shows runs as it is written, beside packages that are broken too."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_examples_run(tmp_path):
    """The loop, and the single measurement that follows it."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:3]
    code = "".join(block.split("```")[0] for block in blocks)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "pairs for 10 %" in done.stdout


def test_a_torchvision_that_cannot_be_imported_counts_as_absent(tmp_path):
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text(
        "from torchvision import ops\nraise RuntimeError('operator torchvision::nms does not exist')"
    )
    (fake / "ops.py").write_text("")
    meta = tmp_path / "torchvision-0.28.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    for order in ("import fimprobe, transformers", "import transformers, fimprobe"):
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {order}\n"
            "from transformers import GPT2Config, GPT2LMHeadModel, BertConfig, BertModel\n"
            "GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=5,"
            " bos_token_id=0, eos_token_id=0))\n"
            "print('built')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "built" in done.stdout, (order, done.stderr[-2000:])


def test_the_demo_shows_its_point(tmp_path, capsys):
    from fimprobe.cli import main

    assert main(["demo", "--epochs", "12", "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("mlp", "cnn"):
        line = next(x for x in out.splitlines() if x.startswith(f"What it found: as the {name}"))
        told = re.search(r"went from ([\d.,]+) % to ([\d.,]+) %\.", line)
        first, last = (float(share.replace(",", "")) for share in told.groups())
        assert last > 1.5 * first
    assert "tensorboard --logdir" in out
