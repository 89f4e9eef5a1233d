"""The account of a run: the share of the wall time that the probe took."""

import pytest

from fimprobe.probe import run_account
from fimprobe.probe.run_account import RunAccount


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds since the probe was attached."""
    now = [0.0]
    monkeypatch.setattr(run_account.time, "perf_counter", lambda: now[0])
    return now


def test_the_share_counts_the_measurement_that_runs(clock):
    account = RunAccount(began=0.0, last_end=0.0, probe_seconds=2.0)
    clock[0] = 29.0
    assert account.overhead is None  # that of a start
    clock[0] = 40.0
    assert account.overhead == 2 / 40
    account.measuring_since = 32.0
    assert account.overhead == (2 + 8) / 40


def test_the_share_is_one_at_most(clock):
    account = RunAccount(began=10.0, last_end=10.0, probe_seconds=50.0)
    clock[0] = 45.0
    assert account.overhead == 1.0
