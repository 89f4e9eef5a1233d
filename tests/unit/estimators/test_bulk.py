"""Records that are made without their constructor equal those that it makes."""

import dataclasses

import torch

from fimprobe.estimators.estimate import Estimate, make_estimates


def test_estimates_of_columns_equal_constructed_ones():
    columns = {"trace": torch.tensor([1.0, torch.nan]), "norm": [2.0, 3.0], "rel_error": None}
    first, second = make_estimates(["a", "b"], columns).values()
    assert first == Estimate(trace=1.0, norm=2.0) and second == Estimate(trace=None, norm=3.0)
    assert [*vars(first)] == [f.name for f in dataclasses.fields(Estimate)]
    assert first.unknown is not second.unknown
