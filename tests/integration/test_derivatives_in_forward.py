"""Models whose forward takes derivatives: forces of an energy, physics-informed nets, inner steps."""

import pytest
import torch
from torch import nn

import fimprobe
from tests.models.cases import Lambda
from tests.support.bit_identity import LEAN, data, same, train
from tests.support.single_samples import FIRST_ORDER, assert_first_order, assert_second_order

pytestmark = pytest.mark.usefixtures("double")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def energy(activation):
    return nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 1))


def force(self, x):
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(self.parts[0](x).sum(), x, create_graph=True)
    return self.parts[1](gradient)


def force_as_constant(self, x):
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(self.parts[0](x).sum(), x)
    return self.parts[1](gradient)


def force_of_the_input_itself(self, x):
    (gradient,) = torch.autograd.grad(self.parts[0](x.requires_grad_()).sum(), x, create_graph=True)
    return self.parts[1](gradient)


def force_at_a_hidden_layer(self, x):
    hidden = self.parts[2](x)
    (gradient,) = torch.autograd.grad(self.parts[0](hidden).sum(), hidden, create_graph=True)
    return self.parts[1](gradient + hidden)


def by_func(transformation):
    def forward(self, x):
        def single(z):
            return self.parts[0](z).squeeze(-1)

        return self.parts[1](torch.func.vmap(transformation(single))(x))

    return forward


def by_jvp(self, x):
    _, along = torch.func.jvp(self.parts[0], (x,), (torch.ones_like(x),))
    return self.parts[1](along.expand(-1, 4))


def by_vmap(self, x):
    return self.parts[1](torch.func.vmap(self.parts[0])(x).expand(-1, 4))


def inner_step(self, x):
    layer, outputs = self.parts[1], []
    for row in x:
        loss = layer(row).square().sum()
        (gradient,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        moved = layer.weight - 0.1 * gradient
        outputs.append(nn.functional.linear(row, moved, layer.bias) + self.parts[0](row))
    return torch.stack(outputs)


FORWARDS = {
    "force": force,
    "force as a constant": force_as_constant,
    "force of the input itself": force_of_the_input_itself,
    "force at a hidden layer": force_at_a_hidden_layer,
    "func.grad": by_func(torch.func.grad),
    "func.jacrev": by_func(torch.func.jacrev),
    "func.jacfwd": by_func(torch.func.jacfwd),
    "func.jvp": by_jvp,
    "func.vmap": by_vmap,
    "inner step": inner_step,
}


def model_of(forward, activation=None):
    parts = [energy(activation or nn.Tanh()), nn.Linear(4, 3)]
    if forward is force_at_a_hidden_layer:
        parts.append(nn.Linear(4, 4))
    return Lambda(forward, *parts)


@pytest.mark.parametrize("name", FORWARDS)
def test_gradients(name):
    assert_first_order(model_of(FORWARDS[name]), (X.clone(),))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.SiLU()])
@pytest.mark.parametrize("name", ["force", "func.grad"])
def test_second_derivatives(name, activation):
    """Activations with closed derivatives have two; a force needs the third."""
    assert_second_order(model_of(FORWARDS[name], activation), (X[:2],))


@pytest.mark.parametrize("name", ["force of the input itself", "func.grad"])
def test_every_number_at_once(name):
    model = model_of(FORWARDS[name], nn.GELU())
    report = fimprobe.measure(model, X[:2], likelihood="categorical", draws=1)
    assert report.total.i2 is not None and report.notes == []


def test_inputs_are_not_marked():
    x = X.clone()
    fimprobe.measure(model_of(force_of_the_input_itself), x, **FIRST_ORDER)
    assert not x.requires_grad


def test_physics_informed_net():
    """The residual of a heat equation, with two derivatives."""

    def residual(self, points):
        points = points.requires_grad_()
        values, terms = self.parts[0](points), []
        for k in range(2):
            (first,) = torch.autograd.grad(values[:, k].sum(), points, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
            terms.append(first[:, 1] - second[:, 0])
        return torch.stack(terms, 1)

    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    assert_first_order(Lambda(residual, net), (torch.randn(3, 2),))


def test_a_frozen_energy():
    model = model_of(force, nn.GELU())
    model.parts[0].requires_grad_(False)
    report = assert_first_order(model, (X,))
    assert list(report.parameters) == ["parts.1.weight", "parts.1.bias"]


@pytest.mark.parametrize("name", ["force", "func.grad"])
def test_training_is_unchanged(name):
    torch.set_default_dtype(torch.float32)
    x, y = data(4, 4)

    def trained(probed):
        torch.manual_seed(1)
        model = model_of(FORWARDS[name], nn.SiLU())
        probe = fimprobe.attach(model, **LEAN) if probed else None
        train(model, 2, x, y)
        if probe is not None:
            probe.detach()
            assert len(probe.history) == 2
        return model.state_dict()

    assert same(trained(False), trained(True))
