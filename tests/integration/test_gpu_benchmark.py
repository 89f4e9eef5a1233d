"""The benchmark for a GPU runs every line without one, and says plainly where there is none."""

import os
import re
import subprocess
import sys

import gpu

from fimprobe.engines.moments import fused
from tests.support.paths import BENCHMARKS

SCRIPT = BENCHMARKS / "gpu.py"


def run():
    blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, SCRIPT], env=blind, capture_output=True, text=True, timeout=600
    )


def test_a_dry_run_prints_every_goal(monkeypatch, capsys):
    monkeypatch.setattr(fused, "INTERPRET", True)  # the script leaves it so
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu"])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert "no figure here says anything about a GPU" in printed
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    goals = [goal.strip() for _, goal, _ in table[1:]]
    assert goals.count("≥ 50 %") == 5
    for goal in ("≤ 1.8", "≤ +10 %", "fits", "1", "stated"):
        assert goal in goals
    errors = {
        what.split()[-1]: float(re.match(r"[\d.e+-]+", told)[0])
        for what, goal, told in table[1:]
        if goal.strip() == "stated"
    }
    assert 1e-5 < errors["bfloat16"] < 0.05
    assert errors["float32"] < 1e-5


def test_without_a_gpu_it_says_so_and_fails():
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "no CUDA device here: nothing was measured; pass --cpu for a dry run\n"
