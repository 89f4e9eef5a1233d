"""Piecewise linear is claimed only where second derivatives by the layers' outputs are zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.recording import record_forward
from fimprobe.engines.tracing.smoothness import is_piecewise_linear
from tests.models.cases import Lambda

SIZE = 3


def mlp(*middle):
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Linear(4, 2))


def two(function):
    """A function of two layers' outputs [B, 4]."""
    return Lambda(
        lambda self, x: self.parts[2](function(self.parts[0](x), self.parts[1](x))),
        nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2),
    )  # fmt: skip


def of(function):
    """A function of one layer's output."""
    return mlp(Lambda(lambda self, a: function(a)))


def images(*middle):
    last = nn.LazyLinear(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), *middle, nn.Flatten(), last)
    net(torch.randn(1, 1, 8, 8))
    return net


STRAIGHT = {
    "linear": lambda: mlp(),
    "relu": lambda: mlp(nn.ReLU()),
    "leaky": lambda: mlp(nn.LeakyReLU(), nn.Hardtanh()),
    "prelu": lambda: mlp(nn.PReLU()),
    "eval dropout": lambda: mlp(nn.ReLU(), nn.Dropout()),
    "eval batchnorm": lambda: mlp(nn.BatchNorm1d(4), nn.ReLU()),
    "last bend is before every layer": lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 2)),
    "cnn": lambda: images(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)),
    "residual": lambda: of(lambda a: a + F.relu(a)),
    "sum of two": lambda: two(lambda a, b: a - 2 * b),
    "halves": lambda: of(lambda a: torch.cat(a.chunk(2, 1)[::-1], 1).view(-1, 2, 2).mT.flatten(1)),
    "times a constant": lambda: of(lambda a: a * torch.arange(4.0) / 3),
    "abs, clamp": lambda: of(lambda a: a.abs().clamp(0.1, 2)),
}
CURVED = {
    "tanh": lambda: mlp(nn.Tanh()),
    "gelu": lambda: mlp(nn.GELU()),
    "relu and silu": lambda: mlp(nn.ReLU(), nn.SiLU()),
    "layernorm": lambda: mlp(nn.LayerNorm(4)),
    "batchnorm of the batch": lambda: mlp(nn.BatchNorm1d(4, track_running_stats=False)),
    "elu": lambda: mlp(nn.ELU()),
    "product": lambda: two(torch.mul),
    "quotient": lambda: two(lambda a, b: a / (4 + b.abs())),
    "square": lambda: of(lambda a: a * a),
    "squared relu": lambda: of(lambda a: F.relu(a) ** 2),
    "matrix product": lambda: two(lambda a, b: (a.view(-1, 2, 2) @ b.view(-1, 2, 2)).flatten(1)),
    "weights computed by a layer": lambda: two(
        lambda a, b: torch.einsum("bi,bij->bj", a, b[:, :, None].expand(-1, 4, 4))
    ),
    "attention": lambda: of(lambda a: F.softmax(a, 1)),
    "norm": lambda: of(lambda a: a / a.norm(dim=1, keepdim=True)),
    "hidden in a product further on": lambda: two(lambda a, b: F.relu(a) * b.amax(1, keepdim=True)),
}


def claim(net, x):
    with record_forward(net, len(x), BatchLayouts(), {}) as tape:
        outputs = net(x)
    return is_piecewise_linear(outputs, tape), outputs, tape


def inputs_of(net):
    return torch.randn(SIZE, 1, 8, 8) if isinstance(net[0], nn.Conv2d) else torch.randn(SIZE, 4)


def hessians(net, x):
    """Largest second derivative of the outputs by shifts of the layers' outputs."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    shapes = []
    hooks = [m.register_forward_hook(lambda m, a, z: shapes.append(z.shape)) for m in layers]
    net(x)
    [hook.remove() for hook in hooks]
    shifts = [torch.zeros(s, requires_grad=True) for s in shapes]
    later = iter(shifts)
    hooks = [m.register_forward_hook(lambda m, a, z: z + next(later)) for m in layers]
    outputs = net(x)
    [hook.remove() for hook in hooks]
    largest = 0.0
    for seed in (torch.randn_like(outputs) for _ in range(2)):
        first = torch.autograd.grad(outputs, shifts, seed, create_graph=True)
        for d in first:
            if not d.requires_grad:
                continue
            for direction in (torch.randn_like(d) for _ in range(3)):
                second = torch.autograd.grad(
                    d, shifts, direction, retain_graph=True, allow_unused=True
                )
                largest = max([largest, *(float(s.abs().max()) for s in second if s is not None)])
    return largest


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_networks_are_found_and_have_no_second_derivatives(name, double):
    torch.manual_seed(1)
    net = STRAIGHT[name]().eval()
    net = net if isinstance(net, nn.Sequential) else nn.Sequential(net)
    x = inputs_of(net)
    assert claim(net, x)[0]
    assert hessians(net, x) == 0


@pytest.mark.parametrize("name", CURVED)
def test_curved_networks_are_never_called_straight(name, double):
    torch.manual_seed(1)
    net = CURVED[name]().eval()
    net = net if isinstance(net, nn.Sequential) else nn.Sequential(net)
    x = inputs_of(net)
    assert not claim(net, x)[0]
    assert hessians(net, x) > 1e-6
