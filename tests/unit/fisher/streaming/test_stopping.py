"""The rule by which an estimate stops."""

from fimprobe.fisher.streaming.progress import describe
from fimprobe.fisher.streaming.stopping import MIN_BATCHES, next_decision


def test_decisions_are_made_at_multiples_and_grow_rare():
    decisions, batches = [], 0
    while batches < 2000:
        batches = next_decision(batches)
        decisions.append(batches)
    assert all(n % MIN_BATCHES == 0 for n in decisions)
    steps = [b - a for a, b in zip(decisions, decisions[1:], strict=False)]
    assert steps == sorted(steps) and steps[-1] > 100


def test_the_line_shows_what_is_known():
    assert describe(10, None, None, 0.1, 1.0) == "fimprobe: 10 inputs, error not known yet"
    assert describe(10, float("inf"), None, 0.1, 1.0).endswith("not known yet")
    assert describe(1000, 0.05, 500.0, 0.1, 2.0).endswith("about 0 s left")
