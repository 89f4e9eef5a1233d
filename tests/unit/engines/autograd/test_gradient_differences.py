"""Second derivatives that double backward leaves out without an error are found."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import fimprobe


class Once(torch.autograd.Function):
    """tanh, differentiable once."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Detached(Once):
    """Its backward leaves the graph."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y).detach()


class Twice(Once):
    """Its backward can be differentiated."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Rectified(torch.autograd.Function):
    """ReLU. Its second derivative is zero, but that of a product with a later weight is not."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x > 0)
        return x.clamp(min=0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (positive,) = ctx.saved_tensors
        return g * positive


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def measure(function, dtype=torch.float64):
    torch.manual_seed(0)
    net = Net(function).to(dtype)
    before = {n: p.clone() for n, p in net.named_parameters()}
    report = fimprobe.measure(
        net,
        torch.randn(6, 3, dtype=dtype),
        likelihood="categorical",
        draws="exact",
        bounds=False,
        second_order={"probes": 2},
    )
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    return report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [Once, Detached, Rectified])
def test_a_missing_second_derivative_is_no_zero(function, dtype):
    report = measure(function.apply, dtype)
    assert report.total.i2 is None
    assert any("custom autograd function" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_function_with_second_derivatives_is_measured(dtype):
    report, expected = measure(Twice.apply, dtype), measure(torch.tanh, dtype)
    for name in ("a.weight", "b.bias"):
        value = report.parameters[name].i2.label_variance
        assert value == pytest.approx(expected.parameters[name].i2.label_variance, rel=1e-3)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_compared_with_differences(mode):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(9, 4, mode=mode), nn.Linear(4, 3)

        def forward(self, index):
            return self.out(self.bag(index).tanh())

    options = {"likelihood": "categorical", "second_order": {"probes": 2}}
    report = fimprobe.measure(Bags(), torch.randint(9, (6, 5)), **options)
    assert report.total.i2 is not None
