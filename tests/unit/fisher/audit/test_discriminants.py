"""Functions of a diagonal that separate candidates better than distances do."""

import pytest
import torch

from fimprobe.fisher.audit.diagnosis import OF_DRAWS, Diagnosis
from fimprobe.fisher.audit.discriminants import Discriminants, covariance_of_batches, deviation
from fimprobe.fisher.audit.fits import CandidateFit

INPUTS, ENTRIES, BATCH = 240, 30, 24


@pytest.fixture(scope="module")
def gradients():
    """Gradients of inputs with few directions, for two labellings of like diagonals."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, ENTRIES, generator=generator).double()
    rows = torch.randn(INPUTS, 6, generator=generator).double() @ mix
    scales = 1 + 0.3 * torch.rand(ENTRIES, generator=generator)
    return {"data": rows[None], "other": (rows * scales)[None]}


def simulate(rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(INPUTS, generator=generator) for _ in range(count)]
    means = [rows[0][order].view(-1, BATCH, ENTRIES).mean(1) for order in orders]
    return torch.stack([m.square().mean(0) for m in means])


def test_the_covariance_is_that_of_random_batches(gradients):
    rows = gradients["data"]
    sample = BATCH * simulate(rows, 3000, 1)  # in units of the expectation of one input
    expected = torch.cov(sample.T)
    covariance = covariance_of_batches(rows, BATCH)
    ratio = covariance.diagonal().sum() / expected.diagonal().sum()
    assert 0.8 < float(ratio) < 1.3
    cosine = (covariance * expected).sum() / covariance.norm() / expected.norm()
    assert float(cosine) > 0.95


def test_the_true_candidate_deviates_little_and_another_much(gradients):
    expected = {key: rows[0].square().mean(0) for key, rows in gradients.items()}
    covariance = covariance_of_batches(gradients["data"], BATCH)
    discriminants = Discriminants(expected, "data", covariance)
    simulated = simulate(gradients["data"], 60, 2)
    own = [deviation(discriminants, x, simulated) for x in simulate(gradients["data"], 20, 3)]
    others = [deviation(discriminants, x, simulated) for x in simulate(gradients["other"], 20, 4)]
    assert sorted(own)[15] < 3 and min(others) > 5
    # the scale is that of a convention, and no part of the shape
    x = simulate(gradients["data"], 1, 5)
    torch.testing.assert_close(discriminants.features(7 * x), discriminants.features(x))


def test_batches_with_drawn_labels_are_never_the_only_explanation():
    fit = CandidateFit(labels=OF_DRAWS, batch_size=16, batch_range=(8, 32), scale=1.0, fits=True,
                       scale_words="averaged over batches", error=0.3, noise_error=0.3)  # fmt: skip
    finding = Diagnosis(sentence=None, candidates=[fit]).describe()
    assert "so much noise that none is stated" in finding and "batches of 16 (8 to 32)" in finding
