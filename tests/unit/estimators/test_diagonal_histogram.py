"""Sizes of the entries of diag F̂: counted one by one, sampled without favouring rows, as reported."""

import collections
import math

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.estimators.diagonal_histogram import diagonal_histogram
from fimprobe.statistics import MAX_ENTRIES, subsample_entries


def count(tensors):
    return diagonal_histogram([(subsample_entries(x), x.numel()) for x in tensors])


def count_each(values):
    """By half decades, one entry after the other."""
    return dict(collections.Counter(math.floor(2 * math.log10(v)) / 2 for v in values if v > 0))


def test_every_entry_of_small_tensors_is_counted(double):
    parts = [
        10 ** (3 * torch.randn(30, 34)),
        10 ** (torch.randn(7) - 9),
        torch.zeros(3),
        torch.ones(1),
    ]
    counted = count(parts)
    assert dict(counted) == count_each([v for part in parts for v in part.flatten().tolist()])
    assert counted == sorted(counted)
    assert count([torch.zeros(4)]) == count([]) == count([torch.zeros(0)]) == []
    extreme = torch.tensor([1e-300, 1e300, math.nan, math.inf])
    assert count([extreme]) == [(-80.0, 1.0), (40.0, 1.0)]


@pytest.mark.parametrize("shape", [(1024, 1024), (3, 100_000), (300_007,), (50_000, 4)])
def test_samples_of_large_tensors_stand_for_all(shape, double):
    size = math.prod(shape)
    # sizes that go with the row and with the column: a sample that met some more often would show
    rows = torch.linspace(-3, 0, shape[0])
    values = 10 ** (rows if len(shape) == 1 else rows[:, None] + torch.linspace(-3, 0, shape[1]))
    found, want = dict(count([values])), count_each(values.flatten().tolist())
    assert sum(found.values()) == pytest.approx(size)
    for edge in {*found, *want}:
        share = want.get(edge, 0) / size
        error = (share * (1 - share) / MAX_ENTRIES) ** 0.5
        assert abs(found.get(edge, 0) / size - share) <= 4 * error + 2 / MAX_ENTRIES


@pytest.mark.parametrize("draws", [2, "exact"])
def test_a_report_counts_the_diagonal(draws, double):
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(16, 5)
    report = fimprobe.measure(net, x, likelihood="categorical", draws=draws, diagonals=True)
    entries = [v for d in report.total.i1.diagonal.values() for v in d.flatten().tolist()]
    assert dict(report.sizes) == count_each(entries)
    assert report.to_dict()["sizes"] == [list(pair) for pair in report.sizes]
