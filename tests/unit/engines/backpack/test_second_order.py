"""BackPACK's exact diagonals, layer by layer, against dense Hessians and enumerated labels."""

import pytest
import torch
from torch import nn

from fimprobe.engines.backpack import (
    ggn_diagonals,
    hessian_diagonals,
    measure_moments,
    offending_modules,
)
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Categorical, Gaussian
from fimprobe.model.batch import Batch
from tests.models.cases import Lambda, head, lively
from tests.oracles import brute_force
from tests.support.agreement import by_autograd, close, make_problem

pytestmark = pytest.mark.filterwarnings("error", "ignore:Using padding", "ignore:.*weight_norm")


def mlp(layer, width=5, outputs=3):
    """Curved before and after the layer, so that every term of the recursion counts."""
    return nn.Sequential(
        nn.Linear(4, 5), nn.Sigmoid(), layer, nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, outputs)
    ), torch.randn(3, 4)


def cnn(layer, x):
    channels = x.shape[1]
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[x.dim()](channels, channels, 1)
    body = nn.Sequential(conv, nn.Tanh(), layer, nn.Sigmoid())
    with torch.no_grad():
        width = body.eval()(x)[0].numel()
    return nn.Sequential(*body, head(width)), x


_ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky relu": lambda: nn.LeakyReLU(0.3),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "log-sigmoid": nn.LogSigmoid,
    "elu": nn.ELU,
    "elu alpha": lambda: nn.ELU(0.4),
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softplus steep": lambda: nn.Softplus(beta=2.5, threshold=0.5),
    "prelu": nn.PReLU,
    "prelu channels": lambda: nn.PReLU(5),
    "dropout": nn.Dropout,
    "alpha dropout": nn.AlphaDropout,
    "identity": nn.Identity,
    "linear": lambda: nn.Linear(5, 5),
    "linear no bias": lambda: nn.Linear(5, 5, bias=False),
    "layer norm": lambda: nn.LayerNorm(5),
    "layer norm plain": lambda: nn.LayerNorm(5, elementwise_affine=False),
    "layer norm no bias": lambda: nn.LayerNorm(5, bias=False, eps=0.1),
    "rms norm": lambda: nn.RMSNorm(5),
    "rms norm eps, plain": lambda: nn.RMSNorm(5, eps=0.1, elementwise_affine=False),
    "group norm 2-D": lambda: nn.GroupNorm(1, 5),
    "batch norm": lambda: nn.BatchNorm1d(5),
}

_LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 2, 3, padding=1), (3, 4)),
    "conv1d options": (lambda: nn.Conv1d(4, 6, 2, stride=2, dilation=2, groups=2, padding=1), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, stride=2), (2, 4, 3)),
    "conv2d options": (
        lambda: nn.Conv2d(4, 4, (3, 2), groups=2, dilation=(1, 2), padding=(1, 0)),
        (4, 3, 4),
    ),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False), (3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 3, 2)),
    "conv3d groups": (lambda: nn.Conv3d(2, 2, 2, groups=2), (2, 2, 2, 3)),
    "convtranspose1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1), (3, 4)),
    "convtranspose1d options": (lambda: nn.ConvTranspose1d(4, 2, 3, groups=2, dilation=2), (4, 3)),
    "convtranspose2d": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), (2, 2, 3)),
    "convtranspose2d options": (
        lambda: nn.ConvTranspose2d(4, 4, (2, 1), groups=2, dilation=(2, 1), bias=False),
        (4, 2, 2),
    ),
    "convtranspose3d": (lambda: nn.ConvTranspose3d(2, 1, 2), (2, 1, 2, 2)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(3), (3, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (3, 2, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (2, 2, 1, 2)),
    "layer norm over two": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "layer norm tokens": (lambda: nn.LayerNorm(4), (3, 4)),
    "rms norm over two": (lambda: nn.RMSNorm((3, 4)), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 2, 3)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3), (3, 4)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 2, 2)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 1, 2)),
    "prelu channels": (lambda: nn.PReLU(3), (3, 2, 2)),
    "linear tokens": (lambda: nn.Linear(4, 3), (3, 4)),
    "linear maps": (lambda: nn.Linear(4, 2), (2, 2, 4)),
    "max pool 1d": (lambda: nn.MaxPool1d(2), (3, 5)),
    "max pool 2d": (lambda: nn.MaxPool2d(2, stride=1, padding=1), (2, 3, 3)),
    "max pool 2d options": (lambda: nn.MaxPool2d(2, stride=2, dilation=2, ceil_mode=True), (2, 5, 4)),
    "max pool 3d": (lambda: nn.MaxPool3d(2), (2, 2, 3, 2)),
    "average pool 1d": (lambda: nn.AvgPool1d(3, stride=2, padding=1), (3, 5)),
    "average pool 2d": (lambda: nn.AvgPool2d((2, 3), stride=2, padding=1), (2, 4, 5)),
    "average pool 3d": (lambda: nn.AvgPool3d(2), (2, 2, 3, 2)),
    "adaptive pool 1d": (lambda: nn.AdaptiveAvgPool1d(2), (3, 4)),
    "adaptive pool 2d": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (3, 4, 3)),
    "adaptive pool 3d": (lambda: nn.AdaptiveAvgPool3d((1, 3, 1)), (2, 2, 3, 2)),
    "zero padding": (lambda: nn.ZeroPad2d((1, 0, 2, 1)), (2, 2, 3)),
    "flatten": (lambda: nn.Flatten(), (2, 3, 2)),
    "flatten the end": (lambda: nn.Flatten(2), (2, 3, 2)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), (4, 2)),
    "dropout 1d": (lambda: nn.Dropout1d(), (2, 3)),
    "dropout 2d": (lambda: nn.Dropout2d(), (2, 3, 2)),
    "dropout 3d": (lambda: nn.Dropout3d(), (2, 3, 1, 2)),
    "feature alpha dropout": (lambda: nn.FeatureAlphaDropout(), (2, 3)),
}


def residual():
    """A pre-norm block behind an embedding with padding; its sum is used again, and twice."""

    def f(self, tokens):
        token, norm, up, bend, down, head = self.parts
        x = token(tokens)
        y = x + down(bend(up(norm(x))))
        return head(y + x + y)

    width = 3
    parts = (nn.Embedding(5, width, padding_idx=1), nn.LayerNorm(width), nn.Linear(width, 4))
    parts += (nn.GELU(), nn.Linear(4, width), nn.Sequential(nn.Flatten(), nn.Linear(4 * width, 3)))
    return Lambda(f, *parts), torch.randint(3, (3, 4))


def residual_convolutions():
    """A block of a ResNet with BatchNorm, projected on its shortcut, behind another sum."""

    def f(self, x):
        first, tanh, norm, conv, other, after, tail = self.parts
        y = tanh(first(x)) + 1.0
        return tail(after(other(conv(norm(y)) + y)))

    parts = (nn.Conv2d(2, 3, 1), nn.Tanh(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))
    parts += (nn.Sigmoid(), nn.AvgPool2d(2), head(3))
    return Lambda(f, *parts), torch.randn(2, 2, 2, 2)


def two_ways():
    """Two modules read the input, and the outputs are a sum."""

    def f(self, x):
        a, b, tanh, bend, c, d = self.parts
        y = tanh(a(x)) + bend(b(x))
        return c(y) + d(y)

    parts = (nn.Linear(4, 5), nn.Linear(4, 5), nn.Tanh(), nn.SiLU(), nn.Linear(5, 3), nn.Linear(5, 3))
    return Lambda(f, *parts), torch.randn(3, 4)


SECOND = {
    "residual block": residual,
    "residual convolutions": residual_convolutions,
    "two ways": two_ways,
    **{name: lambda make=make: mlp(make()) for name, make in _ACTIVATIONS.items()},
    **{
        name: lambda make=make, shape=shape: cnn(make(), torch.randn(2, *shape))
        for name, (make, shape) in _LAYERS.items()
    },
    "embedding first": lambda: (
        nn.Sequential(nn.Embedding(5, 3), nn.GELU(), nn.LayerNorm(3), nn.Linear(3, 2), head(8)),
        torch.randint(5, (3, 4)),
    ),
    "embedding padding_idx": lambda: (
        nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Tanh(), head(12)),
        torch.randint(3, (3, 4)),
    ),
    "a single layer": lambda: (nn.Linear(4, 3), torch.randn(3, 4)),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_order_diagonals_equal_dense_ones(name, double):
    torch.manual_seed(1)
    model, x = SECOND[name]()
    lively(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    problem = make_problem(model, x)
    assert offending_modules(problem, second_order=True) == {}
    cotangents = torch.randn(2, *model(x).shape)
    both = hessian_diagonals(problem, problem.batch, cotangents)
    parameters = dict(model.named_parameters())
    assert set(both) == set(parameters)
    have = {n: d[1] for n, d in both.items()}
    largest = max(float(d.abs().max()) for d in have.values())
    alone = hessian_diagonals(problem, problem.batch, cotangents[:1])
    for n, p in parameters.items():
        assert ((both[n][:1] - alone[n]).abs() <= 1e-12 * max(largest, 1e-3)).all(), n
        for b in range(len(x)):

            def scalar(value, n=n, b=b):
                h = torch.func.functional_call(model, {n: value}, (x[b : b + 1],))
                return (cotangents[1, b : b + 1] * h).sum()

            dense = torch.autograd.functional.hessian(scalar, p.detach())
            want = dense.reshape(p.numel(), p.numel()).diagonal().view(p.shape)
            assert ((have[n][b] - want).abs() <= 1e-9 * max(largest, 1e-3)).all(), n
    ggn = ggn_diagonals(problem, problem.batch)
    diag, _, _ = brute_force.enumerate_fisher(
        model, (x,), lambda h: brute_force.categorical_labels(h, 1, h.numel())
    )
    for n, p in parameters.items():
        close(ggn[n], torch.stack([d[n].view(p.shape) for d in diag]))


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", Gaussian(sigma=0.5)])
def test_ggn_of_other_likelihoods(likelihood, double):
    model, x = mlp(nn.GELU(), outputs=2)
    lively(model)
    problem = make_problem(model, x, likelihood=likelihood)
    labels = {
        "bernoulli": brute_force.bernoulli_labels,
        "poisson": lambda h: brute_force.poisson_labels(h, 25),
    }.get(likelihood, lambda h: brute_force.gaussian_labels(h, 0.5))
    diag, _, _ = brute_force.enumerate_fisher(model, (x,), labels)
    for n, have in ggn_diagonals(problem, problem.batch).items():
        close(have, torch.stack([d[n].view(have.shape[1:]) for d in diag]))


def test_ggn_of_positions_classes_first_and_masks(double):
    tokens = nn.Sequential(nn.Embedding(6, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))
    maps = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 1))
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    for model, x, likelihood, shape in [
        (tokens, torch.randint(6, (3, 4)), "categorical", (3, 4)),
        (maps, torch.randn(3, 1, 3, 3), Categorical(class_dim=1), (3, 2, 2)),
        (plain, torch.randn(4, 3), "bernoulli", (4, 3)),
    ]:
        mask = torch.rand(shape) > 0.4
        for where in (None, mask):
            problem = make_problem(lively(model), x, likelihood=likelihood, mask=where)
            want = {  # F_b = Σ w g² of each sample alone
                n: torch.stack([g.a2 for g in rows])
                for n, rows in by_sample(model, x, likelihood, where).items()
            }
            have = ggn_diagonals(problem, problem.batch, mask=where)
            for n in want:
                close(have[n], want[n])
    with pytest.raises(FimprobeError, match="output_fisher"):
        flat = Lambda(lambda s, x: s.parts[0](x), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
        ggn_diagonals(make_problem(flat, x, likelihood="bernoulli"), Batch.of(x), verified=True)


def by_sample(model, x, likelihood, mask):
    rows = {}
    for b in range(len(x)):
        where = None if mask is None else mask[b : b + 1]
        one = make_problem(model, x[b : b + 1], likelihood=likelihood, mask=where)
        for n, moments in by_autograd(one).parameters.items():
            rows.setdefault(n, []).append(moments)
    return rows


def test_the_ggn_needs_less_memory_than_the_hessian(double):
    model, x = mlp(nn.GELU())
    problem = make_problem(model, x, memory_mb=0.002)
    ggn_diagonals(problem, problem.batch)
    with pytest.raises(FimprobeError, match="more than memory_mb=0.002"):
        hessian_diagonals(problem, problem.batch, torch.ones(1, 3, 3))
    half = make_problem(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert "bfloat16" in offending_modules(half, second_order=True)[""]


def test_second_order_in_chunks_frozen_and_too_large(double):
    model, x = mlp(nn.LayerNorm(5))
    model[0].weight.requires_grad_(False)
    x = x.repeat(4, 1)
    problem = make_problem(model, x)
    seed = torch.randn(1, 12, 3)
    whole = hessian_diagonals(problem, problem.batch, seed)
    assert "0.weight" not in whole and "0.bias" in whole
    problem.memory_mb = 0.02
    for n, have in hessian_diagonals(problem, problem.batch, seed).items():
        close(have, whole[n])
    part = hessian_diagonals(problem, problem.batch[5:7], seed[:, 5:7])
    close(part["3.weight"], whole["3.weight"][:, 5:7])
    with pytest.raises(FimprobeError, match="`cotangents` must have the shape of the outputs"):
        hessian_diagonals(problem, problem.batch, seed[:, :5])
    problem.memory_mb = 1e-4
    assert "more than memory_mb=0.0001" in offending_modules(problem, second_order=True)[""]
    with pytest.raises(FimprobeError, match="more than memory_mb=0.0001"):
        hessian_diagonals(problem, problem.batch, seed, verified=True)


def test_precision_is_the_models_own():
    for dtype in (torch.float32, torch.float64):  # the default dtype is float32 here
        model, x = cnn(nn.AvgPool2d(2), torch.randn(2, 2, 4, 4))
        model, x = model.to(dtype), x.to(dtype)
        problem = make_problem(model, x, draws=2)
        hessian_diagonals(problem, problem.batch, torch.ones(1, 2, 3))
        assert measure_moments(problem).parameters["0.weight"].a2.dtype == dtype
        assert torch.get_default_dtype() == torch.float32
    model = nn.Sequential(nn.Linear(2, 2), nn.LogSigmoid(), nn.Linear(2, 3))
    problem = make_problem(model, torch.tensor([[300.0, -300.0], [1000.0, 1000.0]]))
    for d in hessian_diagonals(problem, problem.batch, torch.ones(1, 2, 3)).values():
        assert torch.isfinite(d).all()  # BackPACK's own e^x / (e^x + 1)² is NaN here
    tiny = lively(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    tiny[2].weight.data *= 1e-11  # its fourth powers are below float32's range
    have = measure_moments(make_problem(tiny, torch.randn(4, 4), draws=2)).parameters["0.weight"]
    assert have.a4_sum > 0 and (have.a4 > 0).any()
