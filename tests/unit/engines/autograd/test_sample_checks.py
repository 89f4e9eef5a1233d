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


class Distance(nn.Module):
    """The root of a sum of squares, whose derivative at zero is 0·∞."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(3, 4, bias=False), nn.Linear(1, 3)

    def forward(self, x):
        return self.out(self.a(x).square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("zero", [0, slice(1, None)])
def test_a_sample_whose_gradient_is_not_finite_is_named_as_such(zero):
    x = torch.randn(6, 3)
    x[zero] = 0
    with pytest.raises(fimprobe.BatchError, match="gradients of a sample are not finite"):
        fimprobe.measure(Distance(), x, likelihood="categorical")


def test_a_model_of_one_size_is_verified_on_it_if_all_gradients_fit():
    class Fixed(nn.Linear):
        def forward(self, x):
            if len(x) not in (1, 8):
                raise RuntimeError("compiled for 1 or 8 samples")
            return super().forward(x)

    model, x = Fixed(300, 3), torch.randn(8, 300)  # gradients of 3.6 kB
    options = {"likelihood": "categorical", "estimators": ["i1"], "bounds": False}
    assert fimprobe.measure(model, x, **options).total.i1.trace > 0
    with pytest.raises(fimprobe.FimprobeError, match="compiled for 1 or 8 samples"):
        fimprobe.measure(model, x, memory_mb=0.02, plan=fimprobe.Plan(), **options)
