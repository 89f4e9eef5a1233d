"""No fault ends or changes a training, loses a report, or is told twice."""

import pytest

from tests.faults.campaign import CHEAP, FAULTS, run
from tests.faults.outcome import table


@pytest.mark.parametrize("fault", CHEAP.values(), ids=CHEAP)
def test_a_part_of_the_faults(fault):
    check(run(fault))


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_all_faults(fault):
    check(run(fault))


def check(outcomes):
    assert not any(outcome.problems for outcome in outcomes), table(outcomes)
    for outcome in outcomes:
        assert outcome.injected == outcome.survived > 0
        assert outcome.told_once in (None, outcome.injected)
