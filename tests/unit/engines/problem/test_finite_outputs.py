"""Outputs that are not finite are counted; finite ones whose sum is not are accepted."""

import pytest
import torch
from torch import nn

import fimprobe


def measure(rows):
    x = torch.tensor(rows)
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    return fimprobe.measure(net, x, likelihood="gaussian", estimators=["i1"], bounds=False)


def test_outputs_whose_sum_overflows_are_finite():
    net = nn.Linear(1, 2)
    nn.init.constant_(net.bias, 3e38)
    report = fimprobe.measure(
        net, torch.ones(3, 1), likelihood="gaussian", estimators=["i1"], bounds=False
    )
    assert report.total.numel == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_outputs_that_are_not_finite_are_counted(value):
    with pytest.raises(fimprobe.BatchError, match="[23] of 6 outputs are not finite"):
        measure([[1.0, 2.0], [value, 0.0], [1.0, 0.0]])
