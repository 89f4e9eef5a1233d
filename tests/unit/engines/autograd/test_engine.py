"""The autograd engine against dense Jacobians and enumerated labels."""

import copy

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from tests.models.cases import CASES
from tests.oracles import brute_force

pytestmark = pytest.mark.usefixtures("raw_numbers")

FIRST = {"estimators": ("i1",), "bounds": False}
"""Nothing beside Î₁ is measured."""


@pytest.mark.parametrize("memory_mb", [512, 0.05])
@pytest.mark.parametrize("name", CASES)
def test_exact_draws_equal_enumeration(name, memory_mb, double):
    case = CASES[name]()
    model = case.model.eval()
    oracle = brute_force.enumerate_fisher(
        copy.deepcopy(model) if not any("weight_norm" in n for n in [name]) else model,
        case.inputs,
        lambda h: brute_force.categorical_labels(h, case.positions, case.classes),
    )
    report = fimprobe.measure(
        model,
        case.inputs,
        likelihood="categorical",
        draws="exact",
        diagonals=True,
        memory_mb=memory_mb,
        **FIRST,
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    left_out = {n for n in trainable if not any((d[n] != 0).any() for d in oracle[0])}
    assert set(report.parameters) | left_out >= trainable
    assert any(case.covered_by in how for how in report.coverage.values()), report.coverage
    for n in report.parameters:
        want = brute_force.summarise(*oracle, n)
        have = report.parameters[n].i1
        close(have.diagonal[n], want["diagonal"])
        close(have.diagonal_label_variance[n], want["label"])
        close(have.diagonal_input_variance[n], want["input"])
        close(have.trace, want["diagonal"].sum())
        close(have.label_variance, want["label"].sum())
        close(have.input_variance, want["input"].sum(), 1e-7)
        close(have.total_label_variance, want["l1"])
    whole = brute_force.summarise(*oracle, "")
    close(report.total.i1.total_label_variance, whole["l1"])
    close(report.total.i1.label_variance, whole["label"].sum())
    close(report.total.i1.std_error, whole["per_input_trace"].std() / len(case.inputs[0]) ** 0.5)


def close(have, want, rtol=1e-9):
    """Equal within ``rtol`` of the largest entry, rounding of exact zeros aside."""
    have = torch.as_tensor(have).flatten()
    want = torch.as_tensor(want).flatten()
    bound = rtol * want.abs().max() + 1e-24
    assert ((have - want).abs() <= bound).all(), (have - want).abs().max() / want.abs().max()


def test_a_batch_above_the_ceiling_is_not_taken_one_by_one():
    """The inputs are there in any case: what chunks hold of them does not count against memory_mb."""
    net = nn.Sequential(nn.Linear(8192, 3), nn.Tanh(), nn.Linear(3, 4))
    plan = Plan()
    fimprobe.measure(  # 2 MB of inputs
        net, torch.randn(64, 8192), likelihood="categorical", draws=1, memory_mb=1, plan=plan
    )
    assert plan.chunk_size is None or plan.chunk_size >= 16
