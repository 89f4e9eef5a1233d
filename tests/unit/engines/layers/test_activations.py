"""Activations in closed form against torch's own autograd, and against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations

from fimprobe.engines.layers.activations import closed_form_forward, derivatives_of
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.recording import record_forward

MODULES = {
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU(),
    "NewGELUActivation": activations.NewGELUActivation(),
    "GELUActivation": activations.GELUActivation(),
    "GELUTanh": activations.GELUTanh(),
    "SiLUActivation": activations.ACT2FN["silu"],
    "QuickGELUActivation": activations.QuickGELUActivation(),
}


@pytest.mark.parametrize("name", MODULES)
def test_values_and_both_derivatives_are_the_modules(name):
    module = MODULES[name]
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, 1e-9, -40.0, 40.0])]).double()
    x.requires_grad_()
    want = module(x)
    (slope,) = torch.autograd.grad(want.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    curve = derivatives_of(module)
    for have, expected in zip(curve(x.detach()), (want, slope, bend), strict=True):
        torch.testing.assert_close(have, expected.detach(), rtol=1e-12, atol=1e-13)
    h = 1e-4  # and the second derivative is that of the values
    rough = (module(x + h) - 2 * module(x) + module(x - h)) / h**2
    assert (curve(x.detach())[2] - rough).abs().max() < 1e-6


@pytest.mark.parametrize("name", MODULES)
def test_a_network_bends_as_with_the_module(name, double):
    net = nn.Sequential(
        nn.Linear(4, 5), MODULES[name], nn.Linear(5, 5), MODULES[name], nn.Linear(5, 2)
    )
    x, v, seed = torch.randn(6, 4), torch.randn(6, 5), torch.randn(6, 2)

    def products(net):
        middle = net[0](x)
        out = net[1:](middle)
        (delta,) = torch.autograd.grad(out, middle, seed, create_graph=True)
        return out, delta, *torch.autograd.grad((delta * v).sum(), [middle, net[2].weight])

    want = products(net)
    with record_forward(net, 6, BatchLayouts(), {}, twice_differentiable=True):
        assert net[1].forward is not MODULES[name].__class__.forward
        assert type(net[1](x).grad_fn).__name__ == "NoneType"  # nothing to differentiate
        have = products(net)
        assert "_Activation" in type(net[1](net[0](x)).grad_fn).__name__
    assert "forward" not in net[1].__dict__
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_third_derivative_is_refused_not_wrong(double):
    x = torch.randn(3, requires_grad=True)
    run = closed_form_forward(nn.GELU(), twice=True)
    (slope,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat|does not require grad"):
        torch.autograd.grad(bend.sum(), x)


def test_what_is_not_known_stays_as_it_is():
    class Mine(nn.GELU):
        def forward(self, input):
            return input.sin()

    patched = nn.SiLU()
    patched.forward = torch.sin
    for module in (Mine(), patched, nn.Tanh(), nn.ReLU(), activations.FastGELUActivation()):
        assert (
            closed_form_forward(module, twice=True) is None
            and closed_form_forward(module, twice=False) is None
        )
    assert closed_form_forward(nn.GELU(), twice=False) is None
    once = closed_form_forward(activations.NewGELUActivation(), twice=False)
    x = torch.linspace(-5, 5, 101).double()
    torch.testing.assert_close(once(x), activations.NewGELUActivation()(x), rtol=1e-12, atol=1e-13)
    half = torch.randn(5, dtype=torch.bfloat16, requires_grad=True)
    twice = closed_form_forward(nn.GELU(), twice=True)
    assert torch.equal(twice(half), F.gelu(half)) and not math.isnan(float(twice(half).sum()))
