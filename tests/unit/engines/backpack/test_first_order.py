"""BackPACK's moments, layer by layer, against loops over samples, enumeration, and the other engine."""

import copy

import pytest
import torch
from torch import nn

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.backpack import measure_moments, offending_modules
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Categorical, Gaussian
from fimprobe.likelihoods.draws import Draws
from tests.models.cases import Lambda, lively, net
from tests.oracles import brute_force
from tests.support.agreement import by_autograd, close, make_problem, same

pytestmark = pytest.mark.filterwarnings("error", "ignore:Using padding", "ignore:.*weight_norm")


def by_loops(model, inputs, draws, classes=3):
    """Moments of softmax outputs [B, C], one sample and one label at a time: name -> field -> value."""
    model = copy.deepcopy(model).eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    size = inputs.shape[0]
    uniforms = (
        None
        if draws is None
        else Draws(count=draws, seed=3).uniforms_for(slice(0, size), size, (size,))
    )
    found = {}
    for b in range(size):
        h = model(inputs[b : b + 1])
        p = torch.softmax(h.detach()[0], 0)
        if draws is None:
            labels, weights = range(classes), p
        else:
            labels = [int((p.cumsum(0) < u).sum()) for u in uniforms[b]]
            weights = torch.ones(draws)
        rows = [
            torch.autograd.grad(
                h.log_softmax(1)[0, y],
                list(parameters.values()),
                retain_graph=True,
                allow_unused=True,
            )
            for y in labels
        ]
        for i, name in enumerate(parameters):
            if rows[0][i] is not None:
                g = torch.stack([row[i] for row in rows])
                w = weights.view(-1, *[1] * (g.dim() - 1))
                f = (w * g**2).sum(0)
                flat = g.flatten(1)
                r = f**2 if draws is None else (g**4).sum(0)  # each drawn label is a block
                each = f, (w * g**4).sum(0), f**2, r, flat @ flat.T
                found.setdefault(name, []).append(each)
    out = {}
    for name, rows in found.items():
        a2, a4, q, r, gram = (torch.stack(x) for x in zip(*rows, strict=True))
        out[name] = {"a2": a2.sum(0), "a4": a4.sum(0), "q": q.sum(0), "r": r.sum(0), "gram": gram}
    return out


def normed(layer, x):
    case = net(layer, x)
    for module in case.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return case


def shaped(*shape):
    return lambda: torch.randn(3, *shape)


_1D, _2D, _3D = shaped(4, 9), shaped(4, 6, 5), shaped(2, 4, 5, 4)

FIRST = {
    "linear": (lambda: nn.Linear(4, 5), shaped(4)),
    "linear no bias": (lambda: nn.Linear(4, 5, bias=False), shaped(4)),
    "linear tokens": (lambda: nn.Linear(4, 5), shaped(6, 4)),
    "linear maps": (lambda: nn.Linear(4, 2), shaped(2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), _1D),
    "conv1d all options": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=3, bias=False),
        _1D,
    ),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1), _2D),
    "conv2d stride remainder": (lambda: nn.Conv2d(4, 3, 2, stride=(4, 3)), _2D),
    "conv2d rectangular groups": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        _2D,
    ),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), _2D),
    "conv2d wide padding": (lambda: nn.Conv2d(4, 2, 2, padding=3), _2D),
    "conv3d": (lambda: nn.Conv3d(2, 2, (2, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), _3D),
    "conv3d groups dilation": (lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=2), _3D),
    "convtranspose1d": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1), _1D),
    "convtranspose2d groups": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, dilation=(1, 2)),
        shaped(4, 3, 2),
    ),
    "convtranspose3d no bias": (
        lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, bias=False),
        shaped(2, 2, 3, 2),
    ),
    "batch norm": (lambda: nn.BatchNorm1d(4), shaped(4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), _1D),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4, eps=0.1), _2D),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), _3D),
    "layer norm": (lambda: nn.LayerNorm(4), shaped(4)),
    "layer norm tokens": (lambda: nn.LayerNorm(4, eps=0.1), shaped(3, 4)),
    "layer norm over two": (lambda: nn.LayerNorm((4, 9)), _1D),
    "layer norm no bias": (lambda: nn.LayerNorm(9, bias=False), _1D),
    "group norm": (lambda: nn.GroupNorm(2, 4), _2D),
    "group norm 2-D": (lambda: nn.GroupNorm(2, 6), shaped(6)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), _2D),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), _1D),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(2, affine=True), _3D),
    "rms norm": (lambda: nn.RMSNorm(4), shaped(3, 4)),
    "rms norm over two, eps": (lambda: nn.RMSNorm((4, 9), eps=0.1), _1D),
    "prelu": (lambda: nn.PReLU(), _2D),
    "prelu channels": (lambda: nn.PReLU(4), _2D),
    "prelu channels 2-D": (lambda: nn.PReLU(4), shaped(4)),
    "embedding": (lambda: nn.Embedding(5, 4), lambda: torch.randint(5, (3, 6))),
    "embedding of one token": (lambda: nn.Embedding(5, 4), lambda: torch.randint(5, (3,))),
    "embedding padding_idx": (
        lambda: nn.Embedding(5, 4, padding_idx=1),
        lambda: torch.randint(3, (3, 6)),
    ),
}


@pytest.mark.parametrize("draws", [None, 1, 3])
@pytest.mark.parametrize("name", FIRST)
def test_moments_equal_loops_and_the_other_engine(name, draws, double):
    make, inputs = FIRST[name]
    case = normed(make(), inputs())
    lively(case.model)
    problem = make_problem(case.model, case.inputs, draws=draws)
    assert offending_modules(problem, second_order=False) == {}
    have = measure_moments(problem)
    want = by_loops(case.model, case.inputs[0], draws)
    assert set(have.parameters) == set(want)
    for n, fields in want.items():
        moments = have.parameters[n]
        for field, value in fields.items():
            if field != "gram" or draws != 1:
                close(getattr(moments, field), value)
        close(moments.squared_norms, fields["gram"].diagonal(dim1=1, dim2=2))
        close(moments.a4_sum, fields["a4"].sum())
        close(moments.a2_square, fields["a2"].square().sum())
    same(have, by_autograd(problem))
    assert any(how.startswith("backpack: ") for how in have.coverage.values())


LABELS = {
    "bernoulli": brute_force.bernoulli_labels,
    "poisson": lambda h: brute_force.poisson_labels(h, 25),
    "gaussian": lambda h: brute_force.gaussian_labels(h, 1.0),
    "gaussian, σ": lambda h: brute_force.gaussian_labels(h, 0.5),
    "categorical": lambda h: brute_force.categorical_labels(h, len(h) // 2, 2),
}


def check(problem, labels, model, pick=lambda o: o):
    """Against the other engine and, where labels are exact, Σ_b diag F_b by enumeration."""
    have = measure_moments(problem)
    same(have, by_autograd(problem))
    if problem.draws.count is not None:
        return
    x, mask = problem.batch.args[0], problem.mask
    want = {n: torch.zeros(p.numel()) for n, p in model.named_parameters()}
    for b in range(len(x)):
        keep = torch.ones(1) if mask is None else mask[b].flatten()

        def masked(h, keep=keep):
            for weight, score in labels(h):
                yield weight, (score.view(len(keep), -1) * keep[:, None]).flatten()

        diag, _, _ = brute_force.enumerate_fisher(model, (x[b : b + 1],), masked, pick)
        for n, total in want.items():
            total += diag[0][n]
    for n, moments in have.parameters.items():
        close(moments.a2.flatten(), want[n], rtol=1e-8)


@pytest.mark.parametrize("draws", [None, 2])
@pytest.mark.parametrize("name", ["bernoulli", "poisson", "gaussian", "gaussian, σ"])
def test_other_likelihoods_and_blocks(name, draws, double):
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2))
    likelihood = Gaussian(sigma=0.5) if "σ" in name else name
    problem = make_problem(model, torch.randn(4, 4), likelihood=likelihood, draws=draws)
    check(problem, LABELS[name], model)
    problem.mask = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=torch.bool)
    check(problem, LABELS[name], model)


@pytest.mark.parametrize("draws", [None, 2])
def test_positions_and_masks(draws, double):
    tokens = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    maps = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 1))
    for model, x, axis, shape in [
        (tokens, torch.randint(6, (4, 5)), -1, (4, 5)),
        (maps, torch.randn(4, 2, 3, 3), 1, (4, 2, 2)),
    ]:
        likelihood = Categorical(class_dim=axis)
        problem = make_problem(model, x, likelihood=likelihood, draws=draws)
        for mask in (None, torch.rand(shape) > 0.4):
            problem.mask = mask
            check(problem, LABELS["categorical"], model, lambda h, axis=axis: h.movedim(axis, -1))
    problem.mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(FimprobeError, match="`mask` must have the shape of the labels"):
        measure_moments(problem)


@pytest.mark.parametrize("draws", [None, 3, 17])
def test_chunks_change_nothing(draws, double):
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    x = torch.randn(7, 2, 4, 4)
    whole = make_problem(model, x, draws=draws)
    want = measure_moments(whole)
    assert (want.parameters["0.weight"].gram is None) == (draws == 17)
    if draws != 17:  # accumulated in another order there
        same(want, by_autograd(whole))
    for memory_mb in (0.3, 1) if draws == 17 else (0.03, 0.1):
        same(measure_moments(make_problem(model, x, draws=draws, memory_mb=memory_mb)), want)
    with pytest.raises(FimprobeError, match="more than memory_mb=0.001; pass engine='autograd'"):
        measure_moments(make_problem(model, x, draws=draws, memory_mb=0.001))


def test_layers_that_some_chunks_do_not_use(double, monkeypatch):
    def f(self, x):
        return self.parts[2](torch.tanh(self.parts[0 if x[0, 0] > 0 else 1](x)))

    x = torch.randn(5, 4)
    x[:, 0] = torch.tensor([1.0, 2.0, 3.0, -1.0, 1.0])
    model = Lambda(f, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    problem = make_problem(model, x, draws=2)
    monkeypatch.setattr(
        "fimprobe.engines.backpack.first_order._draws_and_chunk_size", lambda problem: (2, 1)
    )
    have = measure_moments(problem)
    assert (have.parameters["parts.0.bias"].squared_norms.sum(1) > 0).tolist() == [1, 1, 1, 0, 1]
    assert (have.parameters["parts.1.bias"].squared_norms.sum(1) > 0).tolist() == [0, 0, 0, 1, 0]
    same(have, by_autograd_one_by_one(problem))


def by_autograd_one_by_one(problem):
    plan = make_verified_plan(problem)
    plan.chunk_size = 1
    return measure_with_fallbacks(problem, plan).moments["i1"]
