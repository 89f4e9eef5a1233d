"""How many samples run alone: in the first measurements, for new shapes, and where shapes depend on data."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.autograd import sample_checks
from tests.models.cases import CASES


def numbers_of_checks(monkeypatch, model, batches):
    plan, checked = fimprobe.Plan(), []
    find = sample_checks.find_wrong_sample

    def spy(problem, measured, count):
        checked.append(count)
        return find(problem, measured, count)

    monkeypatch.setattr(sample_checks, "find_wrong_sample", spy)
    for seed, inputs in enumerate(batches):
        fimprobe.measure(
            model,
            inputs,
            likelihood="categorical",
            estimators=["i1"],
            bounds=False,
            plan=plan,
            seed=seed,
        )
    return checked


def test_first_measurements_and_one_in_eight_later(monkeypatch):
    x = torch.randn(4, 3)
    checked = numbers_of_checks(monkeypatch, nn.Linear(3, 3), [x] * 10)
    assert checked == [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]


def test_every_new_shape(monkeypatch):
    batches = [torch.randn(size, 3) for size in (4, 4, 4, 4, 5, 5, 4)]
    assert numbers_of_checks(monkeypatch, nn.Linear(3, 3), batches) == [1, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("name", ["packed sequences", "experts"])
def test_always_where_shapes_depend_on_data(name, monkeypatch):
    case = CASES[name]()
    checked = numbers_of_checks(monkeypatch, case.model.eval(), [case.inputs] * 5)
    assert checked == [4, 1, 1, 1, 1]
