"""Comparisons with a noisy estimate: noise explains what it should, and no more."""

import pytest
import torch

import fimprobe
from fimprobe.fisher.audit.comparison import compare_groups, cosine_of, overlap_of, sine
from fimprobe.fisher.decisions import flatten
from tests.models.digits import confident_mlp, digits
from tests.oracles.fisher_diagonal import rms

RUNS = 20
OPTIONS = {"likelihood": "categorical", "progress": False}


@pytest.fixture(scope="module")
def estimates():
    """Estimates with an error of about 20 %, and the exact diagonal."""
    x, model = digits()[0], confident_mlp()
    runs = [fimprobe.estimate(model, x, seed=s, rel_error=0.2, **OPTIONS) for s in range(RUNS)]
    return runs, fimprobe.estimate(model, x, draws="exact", rel_error=1e-9, **OPTIONS)


@pytest.mark.parametrize("group", ["", "layer 0", "layer 4"])
def test_with_f_itself_all_that_is_seen_is_noise(estimates, group):
    runs, exact = estimates
    results = [compare_groups(exact.diagonal, run, 0.1)[group] for run in runs]
    assert rms([r.noise_error for r in results]) > 0.05
    ratio = rms([r.noise_error for r in results]) / rms([r.error for r in results])
    assert 0.7 < ratio < 1.4
    assert abs(sum(r.overlap - r.noise_overlap for r in results)) / RUNS < 0.06
    inside = [abs(r.scale - 1) <= 2 * r.scale_error for r in results]
    assert sum(inside) >= 0.85 * RUNS


def test_an_error_is_seen_through_noise(estimates):
    runs, exact = estimates
    torch.manual_seed(0)
    wrong = {n: f * torch.rand_like(f) * 3 for n, f in exact.diagonal.items()}
    t, f = flatten(wrong), flatten(exact.diagonal)
    results = [compare_groups(wrong, run, 0.1)[""] for run in runs]
    true = sine(cosine_of(t, f))
    assert sum(r.excess_error for r in results) / RUNS == pytest.approx(true, rel=0.1)
    assert sum(r.error for r in results) / RUNS > true
    scale = float(t.sum() / f.sum())
    inside = [abs(r.scale - scale) <= 2 * r.scale_error for r in results]
    assert sum(inside) >= 0.85 * RUNS


def test_some_parameters_are_compared_with_the_noise_of_these(estimates):
    run, exact = estimates[0][0], estimates[1]
    some = {n: f for n, f in exact.diagonal.items() if n.endswith("weight")}
    groups = compare_groups(some, run, 0.1)
    assert set(groups) == {"", "layer 0", "layer 2", "layer 4"}
    assert groups[""].numel == sum(f.numel() for f in some.values())
    assert 0.3 < groups[""].noise_error / groups[""].error < 3
    assert 0 < groups[""].scale_error < 0.3


def test_zeros_leave_numbers_unknown(estimates):
    exact = estimates[1]
    zeros = {n: torch.zeros_like(f) for n, f in exact.diagonal.items()}
    total = compare_groups(zeros, exact, 0.1)[""]
    assert total.scale == 0 and total.cosine is None and total.error is None
    assert total.factor is None and total.overlap is None and total.excess_error is None


def test_overlap_counts_ties_as_random():
    x = torch.tensor([1.0, 1, 1, 0])
    assert overlap_of(x, torch.tensor([9.0, 0, 0, 0]), 1) == pytest.approx(1 / 3)
    assert overlap_of(x, x, 3) == 1
