"""Sums over batches: additive, whatever the batches, and equal to those of single inputs."""

import pytest
import torch

from fimprobe.fisher.sums.accumulation import COLUMNS, FisherSums
from fimprobe.fisher.sums.errors_of_sums import (
    SampleDesign,
    drift,
    entries_rel_error,
    entry_estimates,
    group_errors,
)
from fimprobe.fisher.sums.measurer import Measurer
from fimprobe.likelihoods import Categorical
from fimprobe.model.batch import Batch
from tests.models.small import mlp
from tests.oracles.fisher_diagonal import flat, input_diagonals

X = torch.randn(23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def measurer(double):
    model = mlp()
    return Measurer(model=model, likelihood=Categorical(), output=None, memory_mb=64, seed=3)


def sums_of(measurer, sizes, draws):
    sums = FisherSums.of(measurer.parameters())
    for rows in torch.arange(len(X)).split(sizes):
        sums.add(measurer.moments(Batch.of(X[rows]), None, rows, draws))
    return sums


@pytest.mark.parametrize("draws", [None, 1, 3])
def test_sums_do_not_depend_on_the_batches(measurer, draws):
    whole = sums_of(measurer, [23], draws)
    cut = sums_of(measurer, [1, 10, 11, 1], draws)
    without = len(COLUMNS) - 1  # the last column is about batches
    torch.testing.assert_close(
        whole.columns[:, :without], cut.columns[:, :without], rtol=1e-9, atol=1e-20
    )
    for name, entry in whole.entries.items():
        for field, value in vars(entry).items():
            torch.testing.assert_close(
                value, getattr(cut.entries[name], field), rtol=1e-9, atol=1e-18
            )
    assert (cut.inputs, cut.batches) == (23, 4)


def test_exact_sums_are_those_of_enumeration(measurer):
    sums, truth = sums_of(measurer, [5, 5, 5, 5, 3], None), input_diagonals(measurer.model, X)
    totals = {name: entry.total for name, entry in sums.entries.items()}
    squares = {name: entry.square for name, entry in sums.entries.items()}
    torch.testing.assert_close(flat(totals), truth.sum(0), rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(flat(squares), truth.square().sum(0), rtol=1e-9, atol=1e-18)
    shares = truth.sum(1)
    expected = {"trace": shares, "trace_cube": shares**3, "fourth": truth.square().sum(1) ** 2}
    for name, values in expected.items():
        assert float(sums.column(name)[-1]) == pytest.approx(float(values.sum()), rel=1e-9)


def test_errors_are_those_of_samples(measurer):
    """Of all inputs none with exact labels; of a part that of sampling without replacement."""
    sums, truth = sums_of(measurer, [23], None), input_diagonals(measurer.model, X)
    assert float(group_errors(sums, SampleDesign(size=23)).rel_error[-1]) == 0
    infinite = group_errors(sums, SampleDesign(size=None))
    variance = truth.var(0).sum() / 23
    assert float(infinite.error[-1]) == pytest.approx(float(variance**0.5))
    finite = group_errors(sums, SampleDesign(size=46))
    assert float(finite.error[-1]) == pytest.approx(float((variance / 2) ** 0.5))
    norm = truth.mean(0).square().sum() - variance
    assert float(infinite.norm[-1]) == pytest.approx(float(norm**0.5))
    everything = {n: torch.ones_like(p, dtype=torch.bool) for n, p in measurer.parameters().items()}
    chosen = entries_rel_error(sums, SampleDesign(size=None), everything)
    assert chosen == pytest.approx(float(infinite.rel_error[-1]))


def test_label_variance_is_unbiased(measurer):
    """The mean of the stated variance over many draws is the variance of the estimates."""
    estimates, variances, traces, trace_errors = [], [], [], []
    for seed in range(300):
        measurer.seed = seed
        sums = sums_of(measurer, [23], 2)
        errors = group_errors(sums, SampleDesign(size=23))
        estimates.append(flat({n: e.total / 23 for n, e in sums.entries.items()}))
        variances.append(float(errors.error[-1]) ** 2)
        traces.append(float(errors.trace[-1]))
        trace_errors.append(float(errors.trace_error[-1] / errors.widening[-1]) ** 2)
    spread = float(torch.stack(estimates).var(0).sum())
    assert torch.tensor(variances).mean() == pytest.approx(spread, rel=0.1)
    assert torch.tensor(trace_errors).mean() == pytest.approx(
        float(torch.tensor(traces).var()), rel=0.25
    )
    truth = input_diagonals(measurer.model, X).mean(0)
    off = (torch.stack(estimates).mean(0) - truth).norm() / (spread / 300) ** 0.5
    assert off < 1.5


def test_one_label_gives_an_upper_limit(measurer):
    sums = sums_of(measurer, [23], 1)
    assert not sums.knows_labels
    finite, infinite = (group_errors(sums, SampleDesign(size=n)) for n in (23, None))
    assert torch.equal(finite.error, infinite.error)


def test_sums_of_processes_add_up(measurer):
    whole = sums_of(measurer, [8, 15], 2)
    parts = []
    for rows in torch.arange(23).split([8, 15]):
        part = FisherSums.of(measurer.parameters())
        part.add(measurer.moments(Batch.of(X[rows]), None, rows, 2))
        parts.append(part.tensors())
    merged = whole.with_tensors({name: x + parts[1][name] for name, x in parts[0].items()})
    assert (merged.inputs, merged.labels, merged.batches) == (23, 46, 2) and merged.knows_labels
    torch.testing.assert_close(merged.columns, whole.columns, rtol=1e-12, atol=0)


def test_sorted_batches_drift(measurer):
    def drift_of(order):
        sums = FisherSums.of(measurer.parameters())
        for rows in order.split(2):
            sums.add(measurer.moments(Batch.of(X[rows]), None, rows, None))
        return drift(sums)

    shares = input_diagonals(measurer.model, X).sum(1)
    assert not drift_of(torch.randperm(23))[0]
    assert drift_of(shares.argsort())[1] > 1.5


def test_entries_that_no_input_reaches_have_an_error(measurer):
    sums = sums_of(measurer, [23], None)
    sums.entries["0.bias"].total[0] = sums.entries["0.bias"].square[0] = 0
    _, errors = entry_estimates(sums, SampleDesign(size=None))
    assert float(errors["0.bias"][0]) > 0
    _, errors = entry_estimates(sums, SampleDesign(size=23))
    assert float(errors["0.bias"][0]) == 0
