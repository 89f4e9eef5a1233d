"""Weight-norm bounds against dense Jacobians, constants and norms against dense matrices, in float64."""

import gc
import math
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe.jacobian_bounds.input_norms as patches
import fimprobe.jacobian_bounds.operator_norms as operators
import fimprobe.jacobian_bounds.spectral_norm as spectral
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import BatchError
from fimprobe.jacobian_bounds.conv_geometry import ConvGeometry
from fimprobe.jacobian_bounds.layer_bounds import bound_layer_jacobians
from fimprobe.likelihoods import Gaussian
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin
from tests.models.cases import CASES, Lambda
from tests.oracles import brute_force

SLACK, ATOL = 1 + 1e-9, 1e-13


def bounds(model, *inputs, memory_mb=512.0):
    batch = Batch.of(inputs)
    twin = make_twin(model)
    draws = Draws(count=2, seed=0)
    problem = Problem(
        twin=twin,
        batch=batch,
        likelihood=Gaussian(),
        draws=draws,
        select_outputs=select_outputs,
        mask=None,
        memory_mb=memory_mb,
        diagonals=False,
    )
    return bound_layer_jacobians(problem, batch)


def jacobians(model, inputs):
    """Module path -> per input the dense ∂h/∂(weight, bias) of the parameters it owns."""
    found = {}
    for b in range(len(inputs[0])):
        pieces = {}
        for name, j in brute_force.jacobian(model.eval(), inputs, b)[0].items():
            pieces.setdefault(name.rpartition(".")[0], []).append(j)
        for path, js in pieces.items():
            found.setdefault(path, []).append(torch.cat(js, 1))
    return found


def check(model, *inputs):
    """No bound is below the dense truth; returns the bounds and the worst looseness."""
    found = bounds(model, *inputs)
    exact = jacobians(model, inputs)
    assert set(found) <= set(exact)
    for path, bound in found.items():
        assert (bound.reason is None) == (bound.frobenius is not None) == (bound.spectral is not None)
        if bound.reason is None:
            for b, j in enumerate(exact[path]):
                assert bound.frobenius[b] * SLACK + ATOL >= torch.linalg.matrix_norm(j), path
                assert bound.spectral[b] * SLACK + ATOL >= torch.linalg.matrix_norm(j, 2), path
                assert bound.spectral[b] <= bound.frobenius[b] * SLACK
    return found


def rows_norm(x, *, bias=False):
    """s_max [B] of each sample's rows [T, d] of a Linear layer's inputs, with a 1 for its bias."""
    rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    return torch.linalg.matrix_norm(rows, 2)


ACTIVATIONS = {
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "tanh": (nn.Tanh(), torch.tanh),
    "relu": (nn.ReLU(), F.relu),
    "softplus": (nn.Softplus(2.0), lambda x: F.softplus(x, 2.0)),
    "elu": (nn.ELU(0.7), lambda x: F.elu(x, 0.7)),
    "elu 2": (nn.ELU(2.0), lambda x: F.elu(x, 2.0)),
    "celu": (nn.CELU(2.0), lambda x: F.celu(x, 2.0)),
    "selu": (nn.SELU(), F.selu),
    "log-sigmoid": (nn.LogSigmoid(), F.logsigmoid),
    "leaky": (nn.LeakyReLU(0.1), lambda x: F.leaky_relu(x, 0.1)),
    "leaky -3": (nn.LeakyReLU(-3.0), lambda x: F.leaky_relu(x, -3.0)),
    "rrelu": (nn.RReLU(0.5, 1.7), lambda x: F.rrelu(x, 0.5, 1.7)),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), lambda x: F.hardtanh(x, -0.5, 2.0)),
    "relu6": (nn.ReLU6(), F.relu6),
    "hardsigmoid": (nn.Hardsigmoid(), F.hardsigmoid),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "softsign": (nn.Softsign(), F.softsign),
    "tanhshrink": (nn.Tanhshrink(), F.tanhshrink),
    "softshrink": (nn.Softshrink(0.2), lambda x: F.softshrink(x, 0.2)),
    "hardshrink": (nn.Hardshrink(0.2), lambda x: F.hardshrink(x, 0.2)),
    "threshold": (nn.Threshold(0.1, 2.0), lambda x: F.threshold(x, 0.1, 2.0)),
    "gelu": (nn.GELU(), F.gelu),
    "gelu tanh": (nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (nn.SiLU(), F.silu),
    "silu by hand": (nn.SiLU(), lambda x: x * torch.sigmoid(x)),
    "gelu by hand": (
        nn.GELU("tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "mish": (nn.Mish(), F.mish),
    "square": (nn.ReLU(), lambda x: F.relu(x) ** 2),
    "clamp": (nn.ReLU(), lambda x: x.clamp(-1, 1)),
    "erf": (nn.Tanh(), torch.erf),
    "scaled": (nn.Tanh(), lambda x: 1 - 3 * x / 2),
    "none": (nn.Identity(), lambda x: x),
}


class Steps(nn.Module):
    """Layers as modules, functions between them as they come."""

    def __init__(self, steps):
        super().__init__()
        self.layers = nn.ModuleList(s for s in steps if isinstance(s, nn.Module))
        self.steps = [len(self.layers) if isinstance(s, nn.Module) else s for s in steps]
        count = iter(range(len(steps)))
        self.steps = [next(count) if isinstance(s, nn.Module) else s for s in steps]

    def forward(self, x):
        for s in self.steps:
            x = self.layers[s](x) if isinstance(s, int) else s(x)
        return x


def activation(r):
    if r.random() < 0.1:
        prelu = nn.PReLU()
        nn.init.constant_(prelu.weight, r.choice([-0.5, 0.3, 2.0]))
        return prelu
    return r.choice(list(ACTIVATIONS.values()))[r.random() < 0.5]


def randomised(model, r):
    """Weights of random size, now and then of low rank; BatchNorm with statistics."""
    for m in model.modules():
        for name, p in m.named_parameters(recurse=False):
            if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)):
                nn.init.normal_(p, std=r.choice([0.1, 0.5, 1.0]))
                if name == "weight" and r.random() < 0.2:
                    with torch.no_grad():
                        p.copy_(p.mean(0, keepdim=True).expand_as(p).clone())
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.05, 2)
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            nn.init.normal_(m.weight, std=2.0)
    if r.random() < 0.2:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
        frozen = r.choice(layers)
        for p in frozen.parameters() if r.random() < 0.5 else [frozen.weight]:
            p.requires_grad_(False)
    return model


def random_mlp(r):
    width, d = [], r.randint(1, 6)
    x = torch.randn(r.randint(1, 3), *r.choice([(), (), (3,), (2, 2)]), d)
    steps = []
    for layer in range(r.randint(1, 5)):
        if layer:
            steps.append(activation(r))
            if r.random() < 0.2:
                steps.append(nn.LayerNorm(d) if d > 1 else nn.Dropout())
            if r.random() < 0.2 and x.dim() > 2:
                steps += [lambda x: x.transpose(0, 1), nn.Identity()]
                steps += [nn.Linear(d, d), lambda x: x.transpose(0, 1)]
        out = r.randint(1, 6)
        steps.append(nn.Linear(d, out, bias=r.random() < 0.7))
        d = out
        width.append(d)
    if x.dim() == 3 and r.random() < 0.5:
        steps.append(r.choice([lambda x: x.mean(1), lambda x: x[:, -1], lambda x: x.sum(1) / 2]))
    return randomised(Steps(steps), r), x


POOLS = {
    1: (
        lambda: nn.MaxPool1d(2, 1),
        lambda: nn.AvgPool1d(2, 1, 1),
        lambda: nn.ConstantPad1d(1, 0.5),
        lambda: nn.ReflectionPad1d(1),
    ),
    2: (
        lambda: nn.MaxPool2d(2, 1, 1),
        lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda: nn.AvgPool2d((2, 3), 1, 1, count_include_pad=False),
        lambda: nn.AdaptiveAvgPool2d((3, 2)),
        lambda: nn.AdaptiveMaxPool2d(3),
        lambda: nn.ReplicationPad2d(1),
        lambda: nn.Upsample(scale_factor=2),
        lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
        lambda: nn.Dropout2d(),
    ),
    3: (lambda: nn.MaxPool3d(2, 1), lambda: nn.AvgPool3d(2, 1), lambda: nn.AdaptiveAvgPool3d(2)),
}


def random_convnet(r):
    dims = r.choice([1, 2, 2, 2, 3])
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    channels = r.choice([1, 2, 4])
    x = torch.randn(r.randint(1, 3), channels, *(r.randint(3, 5) for _ in range(dims)))
    steps = []
    for _ in range(r.randint(1, 3)):
        out = r.choice([2, 4])
        groups = r.choice([1, 1, math.gcd(channels, out)])
        layer = conv(
            channels,
            out,
            tuple(r.randint(1, 3) for _ in range(dims)),
            stride=tuple(r.choice([1, 1, 2]) for _ in range(dims)),
            padding=tuple(r.randint(1, 2) for _ in range(dims)),
            dilation=r.choice([1, 1, 2]),
            groups=groups,
            bias=r.random() < 0.7,
            padding_mode=r.choice(["zeros", "zeros", "zeros", "replicate"]),
        )
        steps += [layer] + [norm(out)] * (r.random() < 0.4) + [activation(r)]
        if r.random() < 0.5:
            steps.append(r.choice(POOLS[dims])())
        channels = out
    if r.random() < 0.4:
        steps.append(lambda x: x.mean(tuple(range(2, x.dim()))))
    elif r.random() < 0.3:
        steps.append(lambda x: x.flatten(2).transpose(1, 2))
        steps.append(nn.Linear(channels, 3))
    steps.append(nn.Flatten())
    model = Steps(steps).eval()
    try:
        width = model(x).shape[1]
    except (RuntimeError, ValueError):
        return random_convnet(r)  # too small for a pooling or kernel
    if r.random() < 0.8:
        model = nn.Sequential(model, nn.Linear(min(width, 400), 3, bias=r.random() < 0.7))
        model = model if width <= 400 else model[0]
    return randomised(model, r), x


@pytest.mark.parametrize("kind", [random_mlp, random_convnet])
@pytest.mark.parametrize(
    "block", [pytest.param(b, marks=pytest.mark.long if b >= 2 else ()) for b in range(10)]
)
def test_bounds_hold_on_random_nets(kind, block, double):
    bounded, layers, why = 0, 0, set()
    for seed in range(20):
        torch.manual_seed(1000 * block + seed)
        model, x = kind(random.Random(1000 * block + seed))
        if not any(p.requires_grad for p in model.parameters()):
            continue
        found = check(model, x)
        with torch.no_grad():
            want = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert set(found) == want
        of_layers = [
            b
            for path, b in found.items()
            if isinstance(model.get_submodule(path), (nn.Linear, nn.modules.conv._ConvNd))
        ]
        layers += len(of_layers)
        bounded += sum(b.reason is None for b in of_layers)
        why |= {b.reason for b in of_layers}
    assert bounded == layers > 20, why


@pytest.mark.parametrize("name", CASES)
def test_bounds_hold_or_are_refused(name, double):
    case = CASES[name]()
    found = check(case.model.eval(), *case.inputs)
    assert found


def test_the_bounds_of_a_single_layer_are_tight(double):
    for layer, x in (
        (nn.Linear(4, 3), torch.randn(5, 4)),
        (nn.Linear(4, 3, bias=False), torch.randn(5, 4)),
        (nn.Linear(4, 3), torch.randn(5, 6, 4)),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), torch.randn(2, 3, 6, 5)),
        (nn.Conv1d(4, 6, 2, groups=2), torch.randn(2, 4, 6)),
    ):
        (bound,) = bounds(nn.Sequential(layer), x).values()
        for b, j in enumerate(jacobians(nn.Sequential(layer), (x,))["0"]):
            close(bound.frobenius[b], torch.linalg.matrix_norm(j), 1e-6)
            if layer.weight.dim() < 3 or layer.groups == 1:
                close(bound.spectral[b], torch.linalg.matrix_norm(j, 2), 1e-6)


def test_orthogonal_linear_nets_are_tight(double):
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    model, x = nn.Sequential(*layers), torch.randn(3, 4)
    for path, bound in bounds(model, x).items():
        for b, j in enumerate(jacobians(model, (x,))[path]):
            close(bound.frobenius[b], torch.linalg.matrix_norm(j), 1e-6)
            close(bound.spectral[b], torch.linalg.matrix_norm(j, 2), 1e-6)


def test_one_heavy_last_layer_profits_from_its_frobenius_norm(double):
    """min_j ‖W_j‖_F Π s_max is the sharper one where a later weight has rank one."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(8, 1) @ torch.randn(1, 8))
    found = bounds(model, torch.randn(2, 4))["0"]
    close(found.frobenius, found.spectral, 1e-9)


def test_the_printed_bound_fails_at_the_last_layer_and_with_gelu(double):
    """Eq. 20 as printed: the norm of a layer's input, with a 1 for the bias, times later ‖W‖_F."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(2, 4)
    last, j = bounds(model, x)["2"], jacobians(model, (x,))["2"][0]
    printed = rows_norm(model[:2](x).detach(), bias=True)[0]
    close(torch.linalg.matrix_norm(j), printed * math.sqrt(3), 1e-9)
    assert printed < torch.linalg.matrix_norm(j) <= last.frobenius[0]

    model = nn.Sequential(nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1))
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.tensor([[math.sqrt(2.0)]])
    first, j = bounds(model, x)["0"], jacobians(model, (x,))["0"][0]
    printed = rows_norm(x, bias=True)[0] * torch.linalg.matrix_norm(model[2].weight.detach())
    assert printed < torch.linalg.matrix_norm(j)
    close(first.frobenius[0], torch.linalg.matrix_norm(j), 1e-6)


# -- constants and norms ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in ("none", "square")])
@pytest.mark.parametrize("style", [0, 1])
def test_lipschitz_constants(name, style, double):
    f = ACTIVATIONS[name][style]
    f = f.eval() if isinstance(f, nn.Module) else f
    kinks = torch.tensor([c + e for c in (-3, 0, 3) for e in (-1e-9, 1e-9)])
    grid = torch.cat([torch.linspace(-40, 12, 2_600_001), torch.linspace(-3, 3, 600_001), kinks])
    x = grid.requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    steepest = float(slope.detach().abs().max())
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    values = torch.linspace(-12, 12, 24_001)
    (bound,) = bounds(Steps([layer, f]), values.view(1, -1, 1)).values()
    constant = float(bound.spectral / rows_norm(values.view(1, -1, 1)))
    by_hand = style == 1 and ("by hand" in name or name == "scaled")
    if by_hand or name in ("softsign", "tanhshrink"):  # the slope at this input
        x = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(x).sum(), x)
        close(constant, slope.abs().max(), 1e-9)
    else:
        assert steepest * (1 - 1e-12) <= constant <= steepest * (1 + 1e-6)


def test_prelu_and_batch_norm_constants(double):
    prelu, norm = nn.PReLU(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.2, -1.7]))
        norm.weight.copy_(torch.tensor([-3.0, 1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.04]))
    x = torch.randn(3, 2)
    length = rows_norm(x, bias=True)
    found = bounds(nn.Sequential(nn.Linear(2, 2), prelu), x)["0"].spectral
    close(found, 1.7 * length, 1e-9)
    found = bounds(nn.Sequential(nn.Linear(2, 2), norm), x)["0"].spectral
    close(found, (0.04 + norm.eps) ** -0.5 * length, 1e-9)


def dense(f, shape):
    """The matrix of a linear function, column by column."""
    columns = []
    for i in range(math.prod(shape)):
        unit = torch.zeros(math.prod(shape))
        unit[i] = 1
        columns.append(f(unit.view(1, *shape)).flatten())
    return torch.stack(columns, 1)


BETWEEN = {
    "max overlapping": (nn.MaxPool2d(3, 1, 1), True),
    "max": (nn.MaxPool2d(2), True),
    "max with one input in common": (nn.MaxPool2d(3, 2), True),
    "max dilated": (nn.MaxPool2d(2, 1, dilation=2), True),
    "adaptive max": (nn.AdaptiveMaxPool2d(4), True),
    "average": (nn.AvgPool2d(2), True),
    "average overlapping": (nn.AvgPool2d(3, 1, 1), False),
    "average by a divisor": (nn.AvgPool2d(2, divisor_override=1), True),
    "adaptive average": (nn.AdaptiveAvgPool2d((2, 4)), False),
    "reflection": (nn.ReflectionPad2d(2), True),
    "replication": (nn.ReplicationPad2d(2), True),
    "zeros": (nn.ZeroPad2d((1, 0, -1, 2)), True),
    "nearest": (nn.Upsample(scale_factor=2), True),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), False),
    "pixel shuffle": (nn.PixelShuffle(2), True),
    "channel shuffle": (nn.ChannelShuffle(2), True),
    "mean": (lambda x: x.mean((2, 3)), True),
    "mean over channels": (lambda x: x.mean(1), True),
    "sum": (lambda x: x.sum(-1), True),
    "maximum": (lambda x: x.amax((2, 3)), True),
    "maximum, indices": (lambda x: x.max(2).values, True),
    "slice": (lambda x: x[:, :, 1:, ::2], True),
    "index": (lambda x: x.index_select(1, torch.tensor([0, 2, 2])), True),
    "flip": (lambda x: x.flip(-1), True),
    "permute": (lambda x: x.permute(0, 3, 1, 2), True),
    "batch in the middle": (lambda x: x.permute(2, 0, 3, 1).flatten(0, 1).unflatten(0, (-1, 2)).transpose(0, 1), True),
    "scale": (lambda x: x * torch.arange(5.0), True),
    "scaled by a scalar": (lambda x: -x * 3 / 2, True),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_operators_between_layers(name, double):
    f, exact = BETWEEN[name]
    layer = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4)[:, :, None, None])
    x = torch.randn(2, 4, 6, 5)
    (bound,) = bounds(Steps([layer, f]), x).values()
    jacobian = torch.autograd.functional.jacobian(f, x)
    half = jacobian.numel() // x.numel() // 2
    jacobian = jacobian.reshape(2, half, 2, -1)
    assert not jacobian[0, :, 1].any()
    truth = torch.stack([torch.linalg.matrix_norm(jacobian[b, :, b], 2) for b in range(2)])
    norm = bound.spectral / rows_norm(x.movedim(1, -1))
    assert (norm * SLACK >= truth).all()
    if exact:
        close(norm, truth, 1e-9)
    assert (norm <= 1.6 * truth).all()


def convolutions(count):
    r = random.Random(0)
    while count:
        dims = r.randint(1, 3)
        groups = r.choice([1, 2])
        inner, out = groups * r.randint(1, 2), groups * r.randint(1, 3)
        size = [r.randint(2, 6) for _ in range(dims)]
        options = {
            "stride": [r.randint(1, 3) for _ in range(dims)],
            "padding": [r.randint(0, 2) for _ in range(dims)],
            "dilation": [r.randint(1, 2) for _ in range(dims)],
            "groups": groups,
        }
        kernel = [r.randint(1, 3) for _ in range(dims)]
        if all(
            n + 2 * p > d * (k - 1)
            for n, p, d, k in zip(size, options["padding"], options["dilation"], kernel, strict=True)
        ):
            count -= 1
            yield torch.randn(out, inner // groups, *kernel), [inner, *size], options


def window_of(shape, weight, options):
    placed = {k: v for k, v in options.items() if k != "groups"}
    return ConvGeometry.of(shape[1:], weight.shape[2:], **placed)


@pytest.mark.parametrize("path", ["dense", "images", "symbol"])
def test_convolution_norms(path, double, monkeypatch):
    if path != "dense":
        monkeypatch.setattr(operators, "MAX_DENSE_ROWS", 0)
        monkeypatch.setattr(spectral, "MAX_DENSE_PRODUCTS", 0)
        function = {"images": "_symbol_norm", "symbol": "_images_norm"}[path]
        taken = getattr(operators, {"images": "_images_norm", "symbol": "_symbol_norm"}[path])
        monkeypatch.setattr(operators, function, taken)
    if path == "dense":
        monkeypatch.setattr(operators, "MAX_DENSE_ROWS", 1000)
        monkeypatch.setattr(spectral, "MAX_DENSE_PRODUCTS", 2**30)
    for weight, shape, options in convolutions(60):
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 2]
        matrix = dense(lambda x: conv(x, weight, None, **options), shape)
        window = window_of(shape, weight, options)
        norms = operators.convolution_norms(weight, window, groups=options["groups"])
        close(norms.frobenius, torch.linalg.matrix_norm(matrix), 1e-9)
        truth = float(torch.linalg.matrix_norm(matrix, 2))
        slack = {"dense": 1e-9, "images": 0.1001, "symbol": 0}[path]
        assert norms.spectral >= truth
        assert path == "symbol" or norms.spectral <= truth * (1 + slack)


def test_the_symbol_bounds_a_convolution_tightly_on_large_images(double):
    """Against the norm on a torus, dense at every frequency of a fine grid."""
    r = random.Random(1)
    for _ in range(20):
        dims, groups = r.randint(1, 2), r.choice([1, 2])
        kernel = [r.randint(1, 4) for _ in range(dims)]
        stride, dilation = (r.randint(1, 3) for _ in range(2))
        weight = torch.randn(groups * 3, 2, *kernel)
        n = 48 * stride * dilation
        window = ConvGeometry.of([n] * dims, kernel, [stride] * dims, [0] * dims, [dilation] * dims)
        truth = 0.0
        for part in weight.split(3):
            spread = part.new_zeros(3, 2, *(dilation * (k - 1) + 1 for k in kernel))
            spread[(..., *[slice(None, None, dilation)] * dims)] = part
            symbol = torch.fft.fftn(spread, s=[n] * dims, dim=list(range(2, 2 + dims)))
            for i in range(dims):  # the stride folds these frequencies onto one another
                symbol = symbol.unflatten(2 + 2 * i, (stride, n // stride))
            folds = [2 + 2 * i for i in range(dims)]
            rest = [3 + 2 * i for i in range(dims)]
            symbol = symbol.permute(*rest, 0, 1, *folds).flatten(0, dims - 1).flatten(2)
            truth = max(truth, float(torch.linalg.matrix_norm(symbol, 2).max()))
        truth /= math.sqrt(stride**dims)
        found = operators.convolution_norms(weight, window, groups=groups).spectral
        assert truth * (1 - 1e-9) <= found <= truth * 1.1 * 1.052**dims


def test_the_period_has_room_for_the_whole_kernel(double, monkeypatch):
    """I + R e^(iω), R a rotation by 90°: largest between the frequencies of a period of 2."""
    monkeypatch.setattr(operators, "MAX_DENSE_ROWS", 0)
    monkeypatch.setattr(operators, "_images_norm", operators._symbol_norm)
    weight = torch.stack([torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]])], 2)
    window = ConvGeometry.of((2,), (2,), (1,), (1,), (1,))
    assert operators.convolution_norms(weight, window).spectral >= math.sqrt(3) * (1 - 1e-12)


def test_linear_norms(double, monkeypatch):
    weight = torch.randn(7, 12)
    norms = operators.linear_norms(weight, 5)
    close(norms.spectral, torch.linalg.matrix_norm(weight, 2), 1e-9)
    close(norms.frobenius, torch.linalg.matrix_norm(torch.kron(torch.eye(5), weight)), 1e-9)
    monkeypatch.setattr(spectral, "MAX_DENSE_PRODUCTS", 0)
    n = 400
    orthogonal = torch.linalg.qr(torch.randn(n, n))[0]
    spectra = {
        "random": None,
        "flat": torch.ones(n),
        "linear": torch.linspace(0, 1, n),
        "crowded at the top": 1 - torch.linspace(0, 1, n) ** 3,
        "geometric": 0.9 ** torch.arange(n),
        "two clusters": torch.where(torch.arange(n) < 1, 1.0, 0.97),
        "tiny": 1e-150 * torch.linspace(0, 1, n),
        "zero": torch.zeros(n),
    }
    for name, spectrum in spectra.items():
        weight = torch.randn(n, n + 5) if spectrum is None else orthogonal * spectrum @ orthogonal.T
        truth = float(torch.linalg.matrix_norm(weight, 2))
        for w in (weight, weight.T):
            found = operators.linear_norms(w).spectral
            assert truth * (1 - 1e-12) <= found <= truth * 1.1001, name


@pytest.mark.parametrize("path", ["dense", "powers", "gram", "frobenius", "pixels"])
def test_input_norms(path, double, monkeypatch):
    """X̃ ⊗ I is the Jacobian of a layer's output in its weight and bias."""
    if path != "pixels":
        monkeypatch.setattr(patches, "MAX_PATCH_PRODUCTS", 2**30)
    if path == "dense":
        monkeypatch.setattr(patches, "MAX_EXACT_SIDE", 10**6)
    sides = {"powers": ["MAX_EXACT_SIDE"], "gram": ["MAX_EXACT_SIDE", "MAX_POWER_SIDE"]}
    sides["frobenius"] = [*sides["gram"], "MAX_GRAM_SIDE"]
    for side in sides.get(path, []):
        monkeypatch.setattr(patches, side, 0)
    if path == "pixels":
        monkeypatch.setattr(patches, "MAX_PATCH_PRODUCTS", 0)
    monkeypatch.setattr(patches, "MAX_CHUNK_ELEMENTS", 500)
    for weight, shape, options in convolutions(30):
        images = torch.randn(3, 2, *shape) * torch.tensor([1e-3, 1, 100]).view(
            3, *[1] * len(shape), 1
        )
        bias = options["groups"] == 1 or weight.shape[-1] > 1
        window, groups = window_of(shape, weight, options), options["groups"]
        found = patches.convolution_input_norms(images, window, groups=groups, bias=bias)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 2]
        for b in range(3):
            j = dense(lambda w: conv(images[b], w[0], None, **options), weight.shape)
            if bias:
                ones = dense(
                    lambda c: conv(images[b], weight * 0, c[0], **options), (weight.shape[0],)
                )
                j = torch.cat([j, ones], 1)
            share = math.sqrt(weight.shape[0] / options["groups"])
            close(found.frobenius[b] * share, torch.linalg.matrix_norm(j), 1e-9)
            truth = torch.linalg.matrix_norm(j, 2)
            assert found.spectral[b] >= truth
            assert path != "powers" or found.spectral[b] <= 1.17 * truth
            if path == "dense":
                close(found.spectral[b], truth, 1e-9)


# -- where there are no bounds --------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.c(x + torch.relu(self.b(x)))


def test_residual_nets_keep_the_bounds_that_one_path_leads_to(double):
    found = check(Residual(), torch.randn(3, 4))
    assert found["a"].reason == "the output of 'a' is used 2 times"
    assert found["a"].weight_spectral_norm is not None
    assert found["b"].reason is None and found["c"].reason is None


def reasons(model, *inputs):
    return {path: bound.reason for path, bound in check(model, *inputs).items()}


def test_reasons(double):
    x = torch.randn(3, 4)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    told = reasons(nn.Sequential(a, nn.Tanh(), a, nn.Tanh(), b), x)
    assert told == {"0": "its weight is used 2 times (tied or called again)", "4": None}

    tied = nn.Linear(4, 4, bias=False)
    tied.weight = a.weight
    told = reasons(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), tied), x)
    assert told["0"] == "its weight is used 2 times (tied or called again)" and told["2"] is None

    told = reasons(Steps([a, b, lambda x: torch.softmax(x, -1), nn.Linear(4, 2)]), x)
    assert told == {
        "layers.0": "softmax between layers",
        "layers.1": "softmax between layers",
        "layers.2": None,
    }

    told = reasons(
        Lambda(
            lambda m, x: m.parts[2](m.parts[0](x) * torch.tanh(m.parts[1](x))), a, b, nn.Linear(4, 2)
        ),
        x,
    )
    want = "two activations are multiplied between 'parts.0' and 'parts.2' (MulBackward0)"
    assert told["parts.0"] == want and told["parts.1"] == want and told["parts.2"] is None

    told = reasons(Steps([a, lambda x: torch.cumsum(x, 1), b]), x)
    want = "the function between 'layers.0' and 'layers.1' is not known (CumsumBackward0)"
    assert told == {"layers.0": want, "layers.1": None}
    told = reasons(Steps([a, lambda x: torch.cumsum(x, 1)]), x)
    assert told["layers.0"].startswith("the function between 'layers.0' and the outputs is not known")

    mixed = Steps([nn.Linear(4, 3), lambda x: x.t().reshape(3, 3), nn.Linear(3, 2)])
    told = bounds(mixed, x)["layers.0"].reason
    assert "cannot be separated between 'layers.0' and 'layers.1'" in told

    wn = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    told = reasons(nn.Sequential(a, wn, b), x)
    assert told["0"] is None and told["2"] is None
    assert told["1.parametrizations.weight"] == "its weight is computed"

    circular = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")
    told = reasons(nn.Sequential(nn.Conv1d(1, 1, 1), circular, nn.Flatten()), torch.randn(2, 1, 5))
    assert told["1"] is None and "(CopySlices)" in told["0"]

    told = reasons(nn.Sequential(a, nn.LogSoftmax(-1)), x)
    assert told == {"0": "log-softmax between layers"}

    class Twist(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 5

        @staticmethod
        def backward(ctx, g):
            return g * 5

    told = reasons(Steps([a, Twist.apply, b]), x)
    assert told["layers.0"].endswith("is not known (TwistBackward)")


def test_attention_ends_the_chain(double):
    told = reasons(CASES["multihead self"]().model.eval(), *CASES["multihead self"]().inputs)
    assert told["parts.1"] is None
    assert all(v for k, v in told.items() if "self_attn" in k and "layers.0" in k)


def test_forks_inside_and_beside_elementwise_functions(double):
    """h·sigmoid(h) ends at h only if neither h nor sigmoid(h) goes anywhere else."""
    x = torch.randn(2, 4)
    linear = lambda: nn.Linear(4, 4)  # noqa: E731

    def gate(self, x):
        h = self.parts[0](x)
        return h * torch.sigmoid(h)

    def inner(self, x):
        h = self.parts[0](x)
        s = torch.sigmoid(h)
        return h * s + self.parts[1](s)

    def outer(self, x):
        h = self.parts[0](x)
        return h * torch.sigmoid(h) + self.parts[1](h)

    assert reasons(Lambda(gate, linear()), x)["parts.0"] is None
    told = reasons(Lambda(inner, linear(), linear()), x)
    assert told["parts.0"] is not None and told["parts.1"] is None
    told = reasons(Lambda(outer, linear(), linear()), x)
    assert told["parts.0"] is not None and told["parts.1"] is None

    def late(self, x):  # met as a fork only after the function's end is found
        h = self.parts[0](x)
        return torch.cat([h * torch.sigmoid(h), self.parts[1](h)], 1)

    told = reasons(Lambda(late, linear(), linear()), x)
    assert told["parts.0"] == "the output of 'parts.0' is used 3 times" and told["parts.1"] is None


def test_branches_of_a_sum_carry_their_factor(double):
    f = lambda self, x: torch.add(torch.tanh(self.parts[0](x)), self.parts[1](x), alpha=-3)  # noqa: E731
    x = torch.randn(2, 4)
    found = check(Lambda(f, nn.Linear(4, 4), nn.Linear(4, 4)), x)
    length = rows_norm(x, bias=True)
    close(found["parts.0"].spectral, length, 1e-9)
    close(found["parts.1"].spectral, 3 * length, 1e-9)
    f = lambda self, x: self.parts[0](x) + self.parts[1](x).mean(1, keepdim=True)  # noqa: E731
    found = check(Lambda(f, nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 3, 4))
    assert all(b.reason is None for b in found.values())


def test_samples_are_told_apart_behind_a_time_major_fold(double):
    """[B, T, d] -> [T, B, d] -> [T·B, d], with operators that need to know where the batch is."""

    def f(self, x):
        y = self.parts[0](x * 2).transpose(0, 1).flatten(0, 1)
        y = F.max_pool1d(self.parts[1](y), 2, 1).t().t()
        return self.parts[2](y).unflatten(0, (x.shape[1], x.shape[0])).transpose(1, 2).sum(0).t()

    parts = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(4, 3)
    x = torch.randn(3, 2, 4) * torch.tensor([0.01, 1, 100])[:, None, None]
    found = check(Lambda(f, *parts), x)
    assert found["parts.0"].reason is None and found["parts.2"].reason is None
    alone = [bounds(Lambda(f, *parts), x[b : b + 1]) for b in range(3)]
    for path in ("parts.0", "parts.2"):
        close(found[path].spectral, torch.cat([a[path].spectral for a in alone]), 1e-9)


def test_batch_statistics_and_flips_mix_samples(double):
    x = torch.randn(3, 4)
    for step in (
        nn.BatchNorm1d(4, track_running_stats=False),
        lambda x: x.flip(0),
        lambda x: x.cumsum(0),
    ):
        model = Steps([nn.Linear(4, 4), step, nn.Linear(4, 2)])
        assert bounds(model, x)["layers.0"].reason is not None
    assert bounds(model, x)["layers.1"].reason is None


class Narrow(nn.Module):
    """A bias added to a part of the outputs' dimensions is no layer's bias."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(x, self.weight).view(len(x), 3, 4) + self.bias


def test_a_bias_of_another_width_is_not_taken_for_the_layers(double):
    (reason,) = reasons(nn.Sequential(Narrow(), nn.Flatten()), torch.randn(2, 4)).values()
    assert reason == "this Narrow has parameters besides one weight and its bias"


def test_a_transposed_weight_used_twice_is_a_fork(double):
    def f(self, x):
        w = self.parts[0].weight.t()
        return torch.tanh(x @ w) @ w

    told = reasons(Lambda(f, nn.Linear(4, 4, bias=False)), torch.randn(2, 4))
    assert told == {"parts.0": "its weight is used 2 times (tied or called again)"}


def test_parameters_on_the_left_are_not_taken_for_a_layer(double):
    model = Lambda(
        lambda m, x: (m.parts[0].weight @ m.parts[1](x).t()).t(),
        nn.Linear(4, 3, bias=False),
        nn.Linear(4, 4),
    )
    told = reasons(model, torch.randn(4, 4))
    assert all("is not known (MmBackward0)" in reason for reason in told.values())


def test_frozen_models_and_bad_outputs(double):
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(BatchError, match="not finite"):
        bounds(model, torch.full((2, 4), math.nan))
    assert bounds(model.requires_grad_(False), torch.randn(2, 4)) == {}


def test_zero_weights(double):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    for p in model.parameters():
        nn.init.zeros_(p)
    found = check(model, torch.zeros(2, 4))
    assert found["0"].frobenius.tolist() == [0, 0] and found["0"].reason is None
    close(found["2"].spectral, torch.ones(2), 1e-9)


# -- manners --------------------------------------------------------------------------------------


def test_float32_agrees_with_float64():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    x = torch.randn(3, 2, 6, 6)
    single, double = bounds(model, x), bounds(model.double(), x.double())
    for path in ("0", "5"):
        for field in ("frobenius", "spectral"):
            assert getattr(single[path], field).dtype == torch.float64
            close(getattr(single[path], field), getattr(double[path], field), 1e-4)


def test_nothing_is_changed_or_kept():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    batch = Batch.of((torch.randn(3, 2, 6, 6),))
    twin = make_twin(model)
    twin[2].register_forward_hook(lambda m, i, o: seen.append(weakref.ref(o)))
    problem = Problem(
        twin=twin,
        batch=batch,
        likelihood=Gaussian(),
        draws=Draws(count=2, seed=0),
        select_outputs=select_outputs,
        mask=None,
        memory_mb=512,
        diagonals=False,
    )
    state = torch.get_rng_state()
    gc.collect()
    gc.disable()
    try:
        first = bound_layer_jacobians(problem, batch)
        assert seen[0]() is None
    finally:
        gc.enable()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in twin.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(b.frobenius.requires_grad for b in first.values() if b.frobenius is not None)
    second = bound_layer_jacobians(problem, batch)
    assert torch.equal(first["0"].frobenius, second["0"].frobenius)


def test_parts_of_a_batch_give_the_same(double):
    model, x = Residual(), torch.randn(7, 4)
    whole = bounds(model, x)
    for memory_mb in (1e-9, 6e-4):
        parts = bounds(model, x, memory_mb=memory_mb)
        assert list(parts) == list(whole)
        for path, bound in whole.items():
            assert parts[path].reason == bound.reason
            if bound.reason is None:
                for field in ("frobenius", "spectral"):
                    close(getattr(parts[path], field), getattr(bound, field), 1e-12)


def test_what_cannot_be_read_ends_the_chain(double):
    from torch.utils.checkpoint import checkpoint

    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    f = lambda self, x: self.parts[2](  # noqa: E731
        torch.tanh(checkpoint(self.parts[1], self.parts[0](x), use_reentrant=False))
    )
    found = check(Lambda(f, nn.Linear(4, 4), inner, nn.Linear(4, 2)), torch.randn(3, 4))
    assert found["parts.2"].reason is None
    changed = Steps([nn.Linear(4, 4), torch.sigmoid, lambda x: x.mul_(2), nn.Linear(4, 2)])
    assert bounds(changed, torch.randn(3, 4))["layers.1"].reason is None


def test_complex_layers_are_refused(double):
    model = Steps([nn.Linear(4, 4, dtype=torch.complex128), torch.abs, nn.Linear(4, 2)])
    told = {k: b.reason for k, b in bounds(model, torch.randn(3, 4, dtype=torch.complex128)).items()}
    assert told["layers.1"] is None and "is not known" in told["layers.0"]


def test_frozen_layers_that_mix_samples_are_noticed(double):
    frozen = nn.Linear(6, 6).requires_grad_(False)
    model = Steps([nn.Linear(4, 3), lambda x: frozen(x.view(1, 6)).view(2, 3), nn.Linear(3, 2)])
    told = bounds(model, torch.randn(2, 4))["layers.0"].reason
    assert "cannot be separated" in told


def close(have, want, tolerance):
    have, want = torch.as_tensor(have), torch.as_tensor(want)
    assert have.shape == want.shape
    assert ((have - want).abs() <= tolerance * want.abs().clamp(min=1e-300)).all(), (have, want)
