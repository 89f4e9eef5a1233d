"""How often a statistical test repeats a measurement: seldom by default, often under ``-m long``."""

from typing import Any

import pytest


def few_or_many(few: int, many: int) -> list[Any]:
    """Values of a parameter: ``few`` repetitions, and ``many`` of a test marked ``long``."""
    return [few, pytest.param(many, marks=pytest.mark.long)]


def limit(repetitions: int) -> float:
    """Number of standard errors by which a mean may be off.

    The error that few repetitions show is itself uncertain. By Student's t a mean of 16 is off by 5
    of its errors as rarely as one of 40 by 4 (P = 2e-4).
    """
    return 4.0 if repetitions >= 40 else 5.0
