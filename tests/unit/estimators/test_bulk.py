"""Records that are made without their constructor equal those that it makes."""

import dataclasses

import torch

from fimprobe.estimators.estimate import Estimate, make_estimates
from fimprobe.estimators.pair_variance import PairVariance, pair_variances


def test_estimates_of_columns_equal_constructed_ones():
    columns = {"trace": torch.tensor([1.0, torch.nan]), "norm": [2.0, 3.0], "rel_error": None}
    first, second = make_estimates(["a", "b"], columns).values()
    assert first == Estimate(trace=1.0, norm=2.0) and second == Estimate(trace=None, norm=3.0)
    assert [*vars(first)] == [f.name for f in dataclasses.fields(Estimate)]
    assert first.unknown is not second.unknown


def test_pair_variances_equal_constructed_ones():
    square = torch.tensor([[1.0, 2.0, 4.0]])
    (made,) = pair_variances(2 * square, square, square.sqrt(), torch.tensor([0.5]))
    assert made == PairVariance(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})
    assert made.one_label == made.relative(1)
    assert dataclasses.replace(made, fourth=9.0).one_label != made.one_label
