"""The benchmark for a GPU runs every line without one, and says plainly where there is none."""

import os
import re
import subprocess
import sys

from tests.support.paths import BENCHMARKS

SCRIPT = BENCHMARKS / "gpu.py"


def run(*options):
    blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, env=blind, capture_output=True, text=True, timeout=600)


def test_a_dry_run_prints_every_goal():
    done = run("--cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no figure here says anything about a GPU" in done.stdout
    table = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")
    ]
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
