"""Claims of error, from initialisation to certainty, against enumeration over all inputs.

Every stage takes many measurements of inputs drawn at random, at the defaults (32 inputs, 2 labels),
and larger ones where few of 32 inputs carry F. What is claimed is held to what is true; what cannot
be known has to be told as unknown.
"""

import pytest
import torch

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from tests.oracles.pools import enumerate_pool, make_pool

STAGES = {
    "MLP": (0, 1, 8, 40, 300),
    "CNN": (0, 1, 8, 40, 500),
    "multi-label": (0, 2, 20, 100, 500),
    "GPT-2": (0, 2, 10, 40, 120),
}
"""Epochs after which is measured."""

SHORT = {"MLP": (0, 8, 80), "CNN": (0, 8, 80), "multi-label": (0, 20, 100), "GPT-2": (0, 40)}
"""The same where only the most frequent faults are sought: fewer epochs, fewer runs."""

KINDS = ("i1", "i2", "ih")
RUNS, SHORT_RUNS = 60, 24


def most_wrong(runs):
    """10 %, and two standard errors of a count of ``runs``."""
    return 0.1 * runs + 2 * (0.1 * 0.9 * runs) ** 0.5


def claims(pool, truth, batch, seed, runs):
    """For each estimator: was the trace covered, the claimed error over the true one, the pairs."""
    found = {kind: {"covered": [], "claimed": [], "off": [], "pairs": []} for kind in KINDS}
    plan = Plan()  # made by the first measurement and kept, as a probe does
    generator = torch.Generator().manual_seed(seed)
    for run in range(runs):
        rows = torch.randint(len(pool.inputs), (batch,), generator=generator)
        report = fimprobe.measure(
            pool.model,
            pool.inputs[rows],
            likelihood=pool.family,
            estimators=KINDS,
            bounds=False,
            diagonals=True,
            seed=run,
            plan=plan,
        )
        for kind in KINDS:
            e, mine = getattr(report.total, kind), found[kind]
            assert (e.std_error is None) == (e.rel_error is None)  # they never contradict each other
            if e.std_error is not None:
                mine["covered"].append(abs(e.trace - truth.trace) <= 2 * e.std_error)
                diagonal = torch.cat([d.flatten() for d in e.diagonal.values()])
                mine["claimed"].append(e.rel_error)
                mine["off"].append(float((diagonal - truth.diagonal).norm() / truth.diagonal.norm()))
            if e.pairs_for(0.1) is not None:
                mine["pairs"].append(e.pairs_for(0.1) / (100 * truth.pair[kind]))
    return found


def check(found, where, runs):
    """90 % are covered or unknown; what is known is right."""
    for kind, mine in found.items():
        known = len(mine["covered"])
        wrong = known - sum(mine["covered"])
        assert wrong <= most_wrong(runs), (where, kind, wrong)
        if known >= max(runs / 4, 15):
            # of fewer runs the count is less certain
            assert wrong <= max(0.2 * known, most_wrong(known)), (where, kind, wrong, known)
            claimed = torch.tensor(mine["claimed"]).square().mean().sqrt()
            true = torch.tensor(mine["off"]).square().mean().sqrt()
            assert 1 / 1.5 < claimed / true < 1.5, (where, kind, float(claimed), float(true))
        if len(mine["pairs"]) >= max(runs / 4, 15):
            pairs = torch.tensor(mine["pairs"])
            # where few of many inputs carry the fourth moments, most samples miss them: what is right
            # on average is below it in most
            assert 0.5 < pairs.mean() < 2, (where, kind, float(pairs.mean()))
            assert 0.4 < pairs.median() < 2, (where, kind, float(pairs.median()))


def measure_stages(name, stages, runs):
    """Check the claims of every stage; the trained pool, and how often Î₁ was known in each stage."""
    pool = make_pool(name)
    epochs, known = 0, []
    for stage, until in enumerate(stages):
        pool.train(until - epochs, stage)
        epochs, truth = until, enumerate_pool(pool)
        where = (name, until, pool.confidence())
        defaults = claims(pool, truth, 32, stage, runs)
        check(defaults, where, runs)
        known.append(len(defaults["i1"]["covered"]))
        if known[-1] < runs / 2:  # more inputs tell what 32 could not
            more = claims(pool, truth, 256, 100 + stage, runs)
            check(more, (*where, "256 inputs"), runs)
            assert len(more["i1"]["covered"]) >= 0.8 * runs, where
    return pool, known


@pytest.mark.parametrize(
    "name", ["MLP", pytest.param("CNN", marks=pytest.mark.long), "multi-label", "GPT-2"]
)
def test_claims_are_true_or_unknown(name):
    pool, known = measure_stages(name, SHORT[name], SHORT_RUNS)
    assert known[0] == SHORT_RUNS and pool.confidence() > 0.7


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_claims_are_true_or_unknown_at_every_confidence(name):
    pool, known = measure_stages(name, STAGES[name], RUNS)
    assert known[0] == RUNS
    assert pool.confidence() > (0.9999 if name in ("MLP", "CNN") else 0.7)
