"""Folders of the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "tests" / "benchmarks"
