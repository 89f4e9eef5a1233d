"""The guard in half precision: a mixed batch is found, and the model is left as it was."""

import copy

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.autograd.curvature_verification import check_curvature
from fimprobe.engines.autograd.full_precision import full_precision
from fimprobe.engines.autograd.verification import make_verified_plan
from tests.oracles import brute_force
from tests.support.curvature import problem_of

HALF = [torch.bfloat16, torch.float16]


class TimeMajor(nn.Module):
    """A trunk on [T·B, d], whose rows look like a folded batch, and casts inside of the forward."""

    def __init__(self, cast=None):
        super().__init__()
        self.a, self.out, self.cast = nn.Linear(4, 4), nn.Linear(4, 3), cast

    def forward(self, x):
        size, length, _ = x.shape
        y = torch.tanh(self.a(x.transpose(0, 1).reshape(length * size, -1)))
        y = 0.3 * y.view(length, size, -1).mean(0)
        return self.out(y if self.cast is None else self.cast(y).to(x.dtype))


CASTS = {
    "to": lambda y: y.to(torch.bfloat16),
    "to keyword": lambda y: y.to(dtype=torch.float16),
    "half": lambda y: y.half(),
    "bfloat16": lambda y: y.bfloat16(),
    "type": lambda y: y.type(torch.bfloat16),
    "new tensor": lambda y: torch.ones((), dtype=torch.bfloat16) * y.to(torch.bfloat16),
}


def compare(model, x):
    """Diagonals of all parameters against enumerated labels in float64."""
    exact = copy.deepcopy(model).double()
    exact.cast = None
    report = fimprobe.measure(
        model, x, likelihood="categorical", draws="exact", diagonals=True, bounds=False,
        estimators=["i1"], second_order="off",
    )  # fmt: skip
    squares = brute_force.enumerate_fisher(
        exact, (x.double(),), lambda h: brute_force.categorical_labels(h.double(), 1, 3)
    )
    for name in report.parameters:
        expected = brute_force.summarise(*squares, name)["diagonal"].flatten()
        computed = report.parameters[name].i1.diagonal[name].double().flatten()
        assert (computed - expected).abs().max() <= 0.05 * expected.abs().max(), name


@pytest.mark.parametrize("dtype", HALF)
def test_mixed_samples_are_found_in_half_precision(dtype):
    torch.manual_seed(0)
    compare(TimeMajor().to(dtype), torch.randn(6, 5, 4).to(dtype))


@pytest.mark.parametrize("name", CASTS)
def test_mixed_samples_are_found_behind_a_cast(name):
    torch.manual_seed(0)
    compare(TimeMajor(CASTS[name]), torch.randn(6, 5, 4))


class Constant(nn.Module):
    """A buffer, an attribute and a tied weight in half precision."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.rand(4))
        self.shift = torch.rand(4).bfloat16()

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.norm(x)) * self.scale + self.shift))


def test_twin_computes_in_float32_and_is_restored():
    torch.manual_seed(0)
    model = Constant().bfloat16()
    problem = problem_of(model, (torch.randn(3, 4).bfloat16(),), likelihood="categorical")
    twin = problem.twin
    state = {n: (x.data_ptr(), x.clone()) for n, x in twin.state_dict().items()}
    shift = twin.shift
    with full_precision(problem) as full:
        assert full.forward(full.batch).dtype == torch.float32
        assert twin.a.weight.dtype == torch.float32 and twin.b.weight is twin.a.weight
        assert torch.zeros(1, dtype=torch.float16).dtype == torch.float32
    assert twin.shift is shift and torch.zeros(1, dtype=torch.float16).dtype == torch.float16
    for name, x in twin.state_dict().items():
        assert x.data_ptr() == state[name][0] and torch.equal(x, state[name][1]), name
    plan = make_verified_plan(problem)
    check_curvature(problem, plan)
    assert plan.curvature_failure == "" and plan.verified_samples == 2


class OnlyHalf(nn.Module):
    """A kernel that refuses float32, or computes something else there."""

    def __init__(self, action):
        super().__init__()
        self.lin, self.action = nn.Linear(4, 3), action

    def forward(self, x):
        return self.lin(x) if x.dtype == torch.bfloat16 else self.action(self.lin(x))


def refuse(x):
    raise RuntimeError("expected bfloat16")


@pytest.mark.parametrize("action", [refuse, lambda x: 2 * x, lambda x: x[:, :2]])
def test_half_precision_is_compared_where_float32_is_another_model(action):
    torch.manual_seed(0)
    model = OnlyHalf(action).bfloat16()
    problem = problem_of(model, (torch.randn(3, 4).bfloat16(),), likelihood="categorical")
    with full_precision(problem) as full:
        assert full is None
    assert make_verified_plan(problem).fallbacks == {}
    assert problem.twin.lin.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [60, 90])
def test_underflowing_gradients_are_measured(depth):
    torch.manual_seed(0)
    hidden = [m for _ in range(depth) for m in (nn.Linear(32, 32), nn.Sigmoid())]
    net = nn.Sequential(nn.Linear(20, 32), nn.Sigmoid(), *hidden, nn.Linear(32, 4))
    x = torch.randn(8, 20)
    options = {"likelihood": "categorical", "draws": 2, "bounds": False, "estimators": ["i1"]}
    report = fimprobe.measure(net, x, second_order="off", **options)
    exact = fimprobe.measure(copy.deepcopy(net).double(), x.double(), second_order="off", **options)
    for name, layer in report.parameters.items():
        trace = exact.parameters[name].i1.trace
        if trace > 1e-60:
            assert layer.i1.trace == pytest.approx(trace, rel=1e-3), name
        else:
            assert 0 <= layer.i1.trace < 1e-58, name
