"""Second derivatives behind modules whose last operation keeps its output for the backward."""

import pytest
import torch
from torch import nn

from fimprobe.engines.autograd.curvature_verification import check_curvature
from fimprobe.engines.autograd.single_samples import differentiable_bags
from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.primitives.random_signs import random_direction
from tests.oracles import brute_force
from tests.support.curvature import problem_of, seeds_of


class KeptExp(torch.autograd.Function):
    """exp, as a function of the user's that keeps its output."""

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y

    generate_vmap_rule = True


OPERATIONS = {
    "tanh": torch.tanh,
    "tanh in place": lambda x: (x * 1).tanh_(),
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(0.3 * x),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "sqrt": lambda x: torch.sqrt(x.square() + 1),
    "rsqrt": lambda x: torch.rsqrt(x.square() + 1),
    "reciprocal": lambda x: torch.reciprocal(x.square() + 1),
    "expm1": lambda x: torch.expm1(0.3 * x),
    "logsumexp": lambda x: torch.logsumexp(torch.stack([x, -x]), 0),
    "custom function": lambda x: KeptExp.apply(0.3 * x),
    "a view of it": lambda x: torch.tanh(x)[:, [1, 0, 2, 3]],
    "sin": torch.sin,
}


class Scaled(nn.Module):
    """A parameter without a rule before an operation."""

    def __init__(self, operation):
        super().__init__()
        self.w, self.operation = nn.Parameter(torch.randn(4)), operation

    def forward(self, x):
        return self.operation(x * self.w)


class Pair(Scaled):
    """Two outputs in a dictionary, of which one keeps its output."""

    def forward(self, x):
        x = super().forward(x)
        return {"a": x, "b": x.cos() * self.w}


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair(torch.tanh)

    def forward(self, x):
        both = self.pair(x)
        return both["a"].sin() * both["b"]


class Nested(nn.Module):
    """A call inside of a call, both of which end in tanh."""

    def __init__(self):
        super().__init__()
        self.inner, self.w, self.lin = (
            Scaled(torch.tanh),
            nn.Parameter(torch.randn(4)),
            nn.Linear(4, 4),
        )

    def forward(self, x):
        return torch.tanh(self.lin(self.inner(x)) * self.w)


class ActivatedLinear(nn.Linear):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class Remembered(nn.Module):
    """Reads the child's output from where the child left it, not only from what it returned."""

    def __init__(self):
        super().__init__()
        self.child = Scaled(self.remember)

    def remember(self, x):
        self.__dict__["last"] = torch.tanh(x)
        return self.__dict__["last"]

    def forward(self, x):
        return self.child(x) * self.__dict__["last"].sin()


MODULES = {name: (lambda f=f: Scaled(f)) for name, f in OPERATIONS.items()}
MODULES |= {
    "two outputs": Joined,
    "nested": Nested,
    "subclass of Linear": lambda: ActivatedLinear(4, 4),
    "read elsewhere": Remembered,
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_matrix_products_equal_double_backward(name, first, double):
    torch.manual_seed(0)
    before = [] if first else [nn.Linear(4, 4)]
    model = nn.Sequential(*before, MODULES[name](), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    problem = problem_of(model, (x,), likelihood="categorical")
    plan = make_verified_plan(problem)
    check_curvature(problem, plan)
    assert plan.curvature_failure == ""
    measured = measure_with_fallbacks(problem, plan)
    assert measured.notes == []
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    products = brute_force.bent(problem.twin, (x,), seeds_of(problem), u)
    for n, span in brute_force.spans(problem.twin).items():
        expected = products[..., span] @ products[..., span].transpose(1, 2)
        computed = measured.curvature.parameters[n].whole[0]
        assert (computed - expected).abs().max() <= 1e-9 * expected.abs().max(), n


class Bags(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.gate, self.out = (
            nn.EmbeddingBag(5, 4, mode=mode),
            Scaled(torch.tanh),
            nn.Linear(4, 3),
        )

    def forward(self, tokens):
        return self.out(self.gate(self.bag(tokens)))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_guard_compares_second_derivatives_behind_bags(mode, double, monkeypatch):
    torch.manual_seed(0)
    problem = problem_of(Bags(mode), (torch.randint(5, (4, 3)),), likelihood="categorical")
    plan = make_verified_plan(problem)
    check_curvature(problem, plan)
    assert plan.curvature_failure == ""
    monkeypatch.setattr("fimprobe.engines.tracing.recording.keeps_output", lambda node: False)
    check_curvature(problem, plan)
    assert "gate.w" in plan.curvature_failure


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"include_last_offset": True}])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_written_out_equal_bags(mode, options, double):
    bag = nn.EmbeddingBag(5, 4, mode=mode, **options)
    flat, last = torch.randint(5, (6,)), [6] if options.get("include_last_offset") else []
    calls = [(flat, torch.tensor([0, 2, 2, 5, *last]))]
    if mode == "sum":
        calls.append((*calls[0], torch.rand(6)))
    if not last:
        calls.append((torch.randint(5, (3, 4)),))
    for call in calls:
        expected = bag(*call)
        with differentiable_bags(nn.Sequential(bag)):
            torch.testing.assert_close(bag(*call), expected)
    assert "forward" not in vars(bag)
