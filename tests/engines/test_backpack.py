"""The BackPACK engine, row by row of its domain, against loops in plain autograd.

First order: moments against per-sample gradients and against the autograd engine. Second order:
diagonals against dense Hessians and Jacobians. Outside of the domain: every silent error is named.
"""

import copy
import subprocess
import sys
import warnings

import oracles
import pytest
import torch
import torch.nn.functional as F
from backpack import backpack, disable, extend, extensions
from backpack.context import CTX
from cases import CASES, Lambda, gpt2, head, lively, net
from torch import nn

from fimprobe.batch import Batch
from fimprobe.engines.backpack import (
    ggn_diagonals,
    hessian_diagonals,
    measure_moments,
    offending_modules,
)
from fimprobe.engines.plan import make_plan, measure_planned
from fimprobe.engines.problem import Problem
from fimprobe.likelihoods import Categorical, Gaussian, get_likelihood
from fimprobe.measurement import select_outputs
from fimprobe.twin import make_twin
from fimprobe.types import Draws, FimprobeError

pytestmark = pytest.mark.filterwarnings("error", "ignore:Using padding", "ignore:.*weight_norm")


def make_problem(model, inputs, *, likelihood="categorical", draws=None, mask=None, memory_mb=512):
    return Problem(
        twin=make_twin(model),
        batch=Batch.of(inputs),
        likelihood=get_likelihood(likelihood),
        draws=Draws(draws, seed=3),
        outputs=select_outputs,
        mask=mask,
        memory_mb=memory_mb,
        diagonals=True,
    )


def close(have, want, rtol=1e-9):
    """Equal within ``rtol`` of the largest entry, rounding of exact zeros aside."""
    have, want = torch.as_tensor(have), torch.as_tensor(want)
    assert have.shape == want.shape
    bound = rtol * want.abs().max() + 1e-20
    assert ((have - want).abs() <= bound).all(), (have - want).abs().max() / want.abs().max()


FIELDS = (
    "a2",
    "a2_sum",
    "a2_square",
    "a4_sum",
    "q_sum",
    "r_sum",
    "squared_norms",
    "gram",
    "a4",
    "q",
    "r",
)


def same(have, want, fields=FIELDS):
    """Two MomentsBatch agree in everything."""
    assert set(have.parameters) == set(want.parameters)
    assert (have.batch_size, have.draws) == (want.batch_size, want.draws)
    for weights in ("second", "fourth", "blocks"):
        a, b = getattr(have, weights), getattr(want, weights)
        assert (a is None) == (b is None)
        if a is not None:
            close(a.double(), b.double())
    for name, moments in have.parameters.items():
        for field in fields:
            a, b = getattr(moments, field), getattr(want.parameters[name], field)
            assert (a is None) == (b is None), (name, field)
            if a is not None:
                close(a, b)


def by_autograd(problem):
    return measure_planned(problem, make_plan(problem)).moments["i1"]


def by_loops(model, inputs, draws, classes=3):
    """Moments of softmax outputs [B, C], one sample and one label at a time: name -> field -> value."""
    model = copy.deepcopy(model).eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    size = inputs.shape[0]
    uniforms = None if draws is None else Draws(draws, 3).uniforms_for(slice(0, size), size, (size,))
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
                each = f, (w * g**4).sum(0), f**2, flat @ flat.T
                found.setdefault(name, []).append(each)
    out = {}
    for name, rows in found.items():
        a2, a4, q, gram = (torch.stack(x) for x in zip(*rows, strict=True))
        out[name] = {"a2": a2.sum(0), "a4": a4.sum(0), "q": q.sum(0), "r": q.sum(0), "gram": gram}
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


@pytest.mark.parametrize("draws", [None, 2])
@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "gaussian", Gaussian(sigma=0.5)])
def test_other_likelihoods_and_blocks(likelihood, draws, double):
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))
    problem = make_problem(model, torch.randn(4, 4), likelihood=likelihood, draws=draws)
    same(measure_moments(problem), by_autograd(problem))
    problem.mask = torch.rand(4, 3) > 0.4
    same(measure_moments(problem), by_autograd(problem))


@pytest.mark.parametrize("draws", [None, 2])
def test_positions_and_masks(draws, double):
    tokens = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    maps = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 3, 1))
    for model, x, likelihood, shape in [
        (tokens, torch.randint(6, (4, 5)), "categorical", (4, 5)),
        (maps, torch.randn(4, 2, 3, 3), Categorical(class_dim=1), (4, 2, 2)),
    ]:
        problem = make_problem(model, x, likelihood=likelihood, draws=draws)
        same(measure_moments(problem), by_autograd(problem))
        problem.mask = torch.rand(shape) > 0.4
        same(measure_moments(problem), by_autograd(problem))
    problem.mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(FimprobeError, match="mask has shape"):
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


class Glue(nn.Module):
    """Functional attention, residual connections, a constant: between modules anything goes."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(6, 4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)
        self.norm, self.spare = nn.LayerNorm(4), nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)  # a name that BackPACK itself sets on modules

    def forward(self, tokens, padding=None):
        x = self.token(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = x + F.gelu(self.output(x)) * 0.5
        return self.out(x.mean(1) if padding is None else (x * padding[..., None]).sum(1))


@pytest.mark.parametrize("draws", [None, 2])
def test_glue_between_modules_is_free_in_first_order(draws, double):
    model = Glue()
    model.norm.weight.requires_grad_(False)
    inputs = {"tokens": torch.randint(6, (4, 5)), "padding": torch.rand(4, 5)}
    problem = make_problem(model, inputs, draws=draws)
    assert offending_modules(problem, second_order=False) == {}
    have = measure_moments(problem)
    same(have, by_autograd(problem))
    assert have.coverage["norm.weight"] == "left out: frozen"
    assert have.coverage["spare.weight"] == "left out: the outputs do not depend on it"
    assert have.coverage["qkv.weight"] == "backpack: Linear"
    found = offending_modules(problem, second_order=True)
    assert {p for p, why in found.items() if "not the output of" in why} == {"out", "output"}
    assert found[""] == "the inputs are not one tensor"
    with pytest.raises(FimprobeError, match="not verified for .*second_order={'probes': 2}"):
        hessian_diagonals(problem, problem.batch, torch.zeros(4, 3))


OUTSIDE = {
    "tied and reused": ({"0", "2"}, "shares a parameter"),
    "functional tie": ({"parts.0"}, "used outside of its forward"),
    "attention net": ({"", "token", "decode", "place", "twice"}, ""),
    "conv2d same": ({"0.0"}, "padding='same'"),
    "conv1d same dilated": ({"0.0"}, "padding='same'"),
    "conv2d reflect": ({"0.0"}, "padding_mode='reflect'"),
    "conv2d circular": ({"0.0"}, "padding_mode='circular'"),
    "conv2d circular same": ({"0.0"}, "padding="),
    "convtranspose1d": ({"0.0"}, "output_padding"),
    "convtranspose2d output size": ({"parts.0"}, "something else than one tensor"),
    "folded frames": ({f"parts.{i}" for i in range(4)}, "does not have the"),
    "time-major fold": ({"parts.0"}, "does not have the"),
    "embedding [1, T] index, T = B": ({"parts.1"}, "does not have the"),
    "BERT": ({"parts.0.bert.embeddings.position_embeddings"}, "does not have the"),
    "encoder, sequence first, T = B": (None, ""),
    "subclass": ({"0.0"}, "SubLinear has no verified rule"),
    "parametrised": ({"0.0", "0.0.parametrizations.weight"}, "no verified rule"),
    "old weight norm": ({"0.0"}, "replaced or hooked"),
    "rms norm of one's own": ({"0.0"}, "no verified rule"),
    "lora": ({"0.0"}, "no verified rule"),
    "scalar parameter": ({""}, "no verified rule"),
    "lstm": ({"parts.0"}, "LSTM has no verified rule"),
    "gru": ({"parts.0"}, "GRU has no verified rule"),
    "multihead batch first": ({"parts.0", "parts.0.out_proj"}, "no verified rule"),
    "bag mean": ({"0"}, "no verified rule"),
    "bilinear": ({"parts.0"}, "no verified rule"),
    "transformers Conv1D": ({"0", "2"}, "no verified rule"),
    "instance norm running": ({"0.0"}, "track_running_stats=True"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_the_domain_every_module_is_named(name):
    case = CASES[name]()
    problem = make_problem(case.model, case.inputs, draws=2)
    paths, reason = OUTSIDE[name]
    found = offending_modules(problem, second_order=False)
    assert found and (paths is None or set(found) == paths)
    assert all(reason in why for why in found.values())
    with pytest.raises(FimprobeError, match="not verified for .*engine='autograd'"):
        measure_moments(problem)


def test_gpt2_is_outside_for_every_reason_at_once():
    case = gpt2()
    found = offending_modules(make_problem(case.model, case.inputs), second_order=False)
    reasons = " | ".join(found.values())
    for reason in ("shares a parameter", "Conv1D has no verified rule", "does not have the"):
        assert reason in reasons


def test_options_outside_of_the_domain():
    x, image = torch.randn(4, 4), torch.randn(3, 2, 4, 4)
    inplace = Lambda(lambda s, x: s.parts[1](s.parts[0](x).relu_()), nn.Linear(4, 4), nn.Linear(4, 3))
    moody = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    )
    noisy = Lambda(lambda s, x: s.parts[0](F.dropout(x, 0.5)), nn.Linear(4, 3))
    coupled = Lambda(lambda s, x: s.parts[0](x - x.mean(0)), nn.Linear(4, 3))
    for model, path, reason in [
        (inplace, "parts.0", "modified in place"),
        (moody, "1", "batch's statistics"),
        (noisy, "", "depend on the other samples"),
        (coupled, "", "depend on the other samples"),
        (Lambda(lambda s, x: s.parts[0](input=x), nn.Linear(4, 3)), "parts.0", "one tensor"),
        (Lambda(lambda s, x: s.parts[0](x.view(4, 4)), nn.Linear(4, 3)), "", "forward fails on 2"),
    ]:
        found = offending_modules(make_problem(model, x), second_order=False)
        assert set(found) == {path} and reason in found[path], found
    trained = make_problem(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), x)
    trained.twin.train()
    assert "statistics" in offending_modules(trained, second_order=False)["1"]
    for layer, reason in [
        (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), "count_include_pad"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
        (nn.AdaptiveAvgPool2d(3), "no divisor"),
        (nn.ZeroPad2d(-1), "negative padding"),
        (nn.BatchNorm2d(2, affine=False), "affine=False"),
        (nn.ReLU6(), "no verified rule"),
        (nn.Softmax(1), "no verified rule"),
        (nn.Conv2d(2, 2, 2, padding="same"), "padding='same'"),
        (nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1), "output_padding"),
    ]:
        model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3)).eval()
        model(image)
        found = offending_modules(make_problem(model, image), second_order=True)
        assert set(found) == {"0"} and reason in found["0"], found
    tail = Lambda(lambda s, x: s.parts[0](x) * 2, nn.Linear(4, 3))
    found = offending_modules(make_problem(tail, x), second_order=True)
    assert found == {"": "the outputs are not the last module's output"}
    skip = Lambda(
        lambda s, x: s.parts[1](x + torch.tanh(s.parts[0](x))), nn.Linear(4, 4), nn.Linear(4, 3)
    )
    assert set(offending_modules(make_problem(skip, x), second_order=True)) == {"parts.1"}
    one = make_problem(nn.Linear(4, 3), torch.randn(1, 4))  # a batch of one is no obstacle
    assert offending_modules(one, second_order=True) == {}


def stock(model, x, extension=None, field="grad_batch"):
    """What plain BackPACK gives for Σ outputs: name -> per-sample values."""
    model = extend(copy.deepcopy(model).eval())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with backpack(extension or extensions.BatchGrad(), retain_graph=True):
                (model(x) * torch.arange(1.0, 4)).sum().backward()
        return {n: getattr(p, field) for n, p in model.named_parameters()}
    finally:
        CTX.remove_hooks()


def per_sample(model, x):
    model = copy.deepcopy(model).eval()
    rows = []
    for b in range(len(x)):
        out = (model(x[b : b + 1]) * torch.arange(1.0, 4)).sum()
        rows.append(torch.autograd.grad(out, list(model.parameters())))
    return {
        n: torch.stack(g)
        for (n, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def used_twice():
    layer = nn.Linear(4, 4)
    return (
        nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)),
        torch.randn(3, 4),
        "0.weight",
    )


def in_two_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model, torch.randn(3, 4), "0.weight"


def padded(**options):
    conv = nn.Conv2d(2, 2, 3, **options)
    return (
        nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(50, 3)),
        torch.randn(3, 2, 5, 5),
        "0.weight",
    )


def flattened_tokens():
    def f(self, x):
        return self.parts[1](torch.tanh(self.parts[0](x.flatten(0, 1))).view(*x.shape).sum(1))

    return Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(3, 2, 4), "parts.0.weight"


def one_row_of_positions():
    def f(self, x):
        return self.parts[1](torch.tanh(x + self.parts[0](torch.arange(2)[None])).sum(1))

    return Lambda(f, nn.Embedding(2, 4), nn.Linear(4, 3)), torch.randn(3, 2, 4), "parts.0.weight"


@pytest.mark.parametrize(
    "make",
    [used_twice, in_two_modules, flattened_tokens, one_row_of_positions]
    + [lambda: padded(padding=1, padding_mode="circular"), lambda: padded(padding="same")],
    ids=["used twice", "in two modules", "flattened tokens", "positions", "circular", "same"],
)
def test_stock_backpack_is_silently_wrong_where_the_domain_ends(make):
    model, x, name = make()
    want = per_sample(model, x)[name]
    have = stock(model, x)[name]
    assert have.shape != want.shape or not torch.allclose(have, want, rtol=1e-3)
    problem = make_problem(model, x, draws=2)
    assert name.rpartition(".")[0] in offending_modules(problem, second_order=False)
    same_shapes = by_autograd(problem).parameters  # the other engine has it
    assert name in same_shapes


def test_stock_batch_l2_is_wrong_with_groups_and_this_engine_is_not(double):
    conv = nn.Conv2d(4, 4, 3, groups=2)
    model, x = nn.Sequential(conv, nn.Flatten(), nn.Linear(16, 3)), torch.randn(3, 4, 4, 4)
    want = per_sample(model, x)["0.weight"].square().flatten(1).sum(1)
    have = stock(model, x, extensions.BatchL2Grad(), "batch_l2")["0.weight"]
    assert not torch.allclose(have, want, rtol=1e-3)
    problem = make_problem(model, x, draws=2)
    same(measure_moments(problem), by_autograd(problem))


def test_the_guards_see_what_the_domain_was_not_asked_about(double):
    for name in ("functional tie", "conv2d circular", "time-major fold", "tied and reused"):
        case = CASES[name]()
        problem = make_problem(case.model, case.inputs, draws=2)
        with pytest.raises(FimprobeError, match="guard|more than once"):
            measure_moments(problem, verified=True)

    def f(self, x):  # switches to another use of the layer on the whole batch
        y = self.parts[0](x)
        return self.parts[1](torch.tanh(y)) if len(x) < 9 else self.parts[1](self.parts[0](y))

    problem = make_problem(Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(6, 4), draws=2)
    with pytest.raises(FimprobeError, match="more than once"):
        measure_moments(problem)


def mlp(layer, width=5):
    """Curved before and after the layer, so that every term of the recursion counts."""
    return nn.Sequential(
        nn.Linear(4, 5), nn.Sigmoid(), layer, nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 3)
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
SECOND = {
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
    seed = torch.randn(model(x).shape)
    have = hessian_diagonals(problem, problem.batch, seed)
    parameters = dict(model.named_parameters())
    assert set(have) == set(parameters)
    largest = max(float(d.abs().max()) for d in have.values())
    for n, p in parameters.items():
        for b in range(len(x)):

            def scalar(value, n=n, b=b):
                h = torch.func.functional_call(model, {n: value}, (x[b : b + 1],))
                return (seed[b : b + 1] * h).sum()

            dense = torch.autograd.functional.hessian(scalar, p.detach())
            want = dense.reshape(p.numel(), p.numel()).diagonal().view(p.shape)
            assert ((have[n][b] - want).abs() <= 1e-9 * max(largest, 1e-3)).all(), n
    ggn = ggn_diagonals(problem, problem.batch)
    diag, _, _ = oracles.enumerate_fisher(
        model, (x,), lambda h: oracles.categorical_labels(h, 1, h.numel())
    )
    for n, p in parameters.items():
        close(ggn[n], torch.stack([d[n].view(p.shape) for d in diag]))


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", Gaussian(sigma=0.5)])
def test_ggn_of_other_likelihoods(likelihood, double):
    model, x = mlp(nn.GELU())
    lively(model)
    problem = make_problem(model, x, likelihood=likelihood)
    labels = {
        "bernoulli": oracles.bernoulli_labels,
        "poisson": lambda h: oracles.poisson_labels(h, 25),
    }.get(likelihood, lambda h: oracles.gaussian_labels(h, 0.5))
    diag, _, _ = oracles.enumerate_fisher(model, (x,), labels)
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


def test_layers_that_some_chunks_do_not_use(double, monkeypatch):
    def f(self, x):
        return self.parts[2](torch.tanh(self.parts[0 if x[0, 0] > 0 else 1](x)))

    x = torch.randn(5, 4)
    x[:, 0] = torch.tensor([1.0, 2.0, 3.0, -1.0, 1.0])
    model = Lambda(f, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    problem = make_problem(model, x, draws=2)
    monkeypatch.setattr("fimprobe.engines.backpack._passes_and_chunk", lambda problem: (2, 1))
    have = measure_moments(problem)
    assert (have.parameters["parts.0.bias"].squared_norms.sum(1) > 0).tolist() == [1, 1, 1, 0, 1]
    assert (have.parameters["parts.1.bias"].squared_norms.sum(1) > 0).tolist() == [0, 0, 0, 1, 0]
    same(have, by_autograd_one_by_one(problem))


def by_autograd_one_by_one(problem):
    plan = make_plan(problem)
    plan.chunk = 1
    return measure_planned(problem, plan).moments["i1"]


def test_a_layer_on_permuted_samples_is_outside(double):
    def f(self, x):
        return self.parts[1](torch.tanh(self.parts[0](x.flip(0)).flip(0)))

    model = Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3))
    found = offending_modules(make_problem(model, torch.randn(4, 4)), second_order=False)
    assert set(found) == {"parts.0"} and "guard" in found["parts.0"]


def test_the_ggn_needs_less_memory_than_the_hessian(double):
    model, x = mlp(nn.GELU())
    problem = make_problem(model, x, memory_mb=0.002)
    ggn_diagonals(problem, problem.batch)
    with pytest.raises(FimprobeError, match="more than memory_mb=0.002"):
        hessian_diagonals(problem, problem.batch, torch.ones(3, 3))
    half = make_problem(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert "bfloat16" in offending_modules(half, second_order=True)[""]


def test_second_order_in_chunks_frozen_and_too_large(double):
    model, x = mlp(nn.LayerNorm(5))
    model[0].weight.requires_grad_(False)
    x = x.repeat(4, 1)
    problem = make_problem(model, x)
    seed = torch.randn(12, 3)
    whole = hessian_diagonals(problem, problem.batch, seed)
    assert "0.weight" not in whole and "0.bias" in whole
    problem.memory_mb = 0.02
    for n, have in hessian_diagonals(problem, problem.batch, seed).items():
        close(have, whole[n])
    part = hessian_diagonals(problem, problem.batch[5:7], seed[5:7])
    close(part["3.weight"], whole["3.weight"][5:7])
    with pytest.raises(FimprobeError, match="seed has shape"):
        hessian_diagonals(problem, problem.batch, seed[:5])
    problem.memory_mb = 1e-4
    assert "more than memory_mb=0.0001" in offending_modules(problem, second_order=True)[""]
    with pytest.raises(FimprobeError, match="more than memory_mb=0.0001"):
        hessian_diagonals(problem, problem.batch, seed, verified=True)


def test_precision_is_the_models_own():
    for dtype in (torch.float32, torch.float64):  # the default dtype is float32 here
        model, x = cnn(nn.AvgPool2d(2), torch.randn(2, 2, 4, 4))
        model, x = model.to(dtype), x.to(dtype)
        problem = make_problem(model, x, draws=2)
        hessian_diagonals(problem, problem.batch, torch.ones(2, 3))
        assert measure_moments(problem).parameters["0.weight"].a2.dtype == dtype
        assert torch.get_default_dtype() == torch.float32
    model = nn.Sequential(nn.Linear(2, 2), nn.LogSigmoid(), nn.Linear(2, 3))
    problem = make_problem(model, torch.tensor([[300.0, -300.0], [1000.0, 1000.0]]))
    for d in hessian_diagonals(problem, problem.batch, torch.ones(2, 3)).values():
        assert torch.isfinite(d).all()  # BackPACK's own e^x / (e^x + 1)² is NaN here
    tiny = lively(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    tiny[2].weight.data *= 1e-11  # its fourth powers are below float32's range
    have = measure_moments(make_problem(tiny, torch.randn(4, 4), draws=2)).parameters["0.weight"]
    assert have.a4_sum > 0 and (have.a4 > 0).any()


def footprint(thing):
    return {k: (id(v), len(v) if isinstance(v, dict) else 0) for k, v in thing.__dict__.items()}


def footprints(model):
    things = [*model.modules(), *model.parameters()]
    return [footprint(x) for x in things]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, double):
    def f(self, x):
        if fails and x.shape[0] >= 9 and torch.is_grad_enabled():
            self.parts[0](x)
            raise RuntimeError("the model's own")
        return self.parts[2](self.parts[1](self.parts[0](x)))

    model = Lambda(f, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model.parts[0].output = "the user's own attribute"
    problem = make_problem(model, torch.randn(9, 4), draws=2)
    twin = problem.twin
    states = [footprints(m) for m in (model, twin)]
    context = (
        CTX.get_active_exts(),
        CTX.get_debug(),
        CTX.get_extension_hook(),
        list(CTX.hook_handles),
    )
    calls = [
        lambda: measure_moments(problem),
        lambda: hessian_diagonals(problem, problem.batch, torch.ones(9, 3)),
        lambda: ggn_diagonals(problem, problem.batch),
    ]
    for call in calls:
        if fails:
            with pytest.raises(RuntimeError, match="the model's own"):
                call()
        else:
            call()
        assert states == [footprints(m) for m in (model, twin)]
        assert context == (
            CTX.get_active_exts(),
            CTX.get_debug(),
            CTX.get_extension_hook(),
            list(CTX.hook_handles),
        )
    assert model.parts[0].output == "the user's own attribute"
    assert all(p.grad is None for m in (model, twin) for p in m.parameters())


def test_a_users_own_backpack_goes_on_working(double):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(3, 4)
    plain = make_problem(model, x, draws=2)
    want = measure_moments(plain)
    extend(model)
    try:
        extension = extensions.BatchGrad()
        with backpack(extension):
            out = model(x).sum()
            with disable():
                have = measure_moments(make_problem(model, x, draws=2))
                assert not disable.should_store_io()
            assert CTX.get_active_exts() == (extension,)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out.backward()
        same(have, want)
        assert model[0].weight.grad_batch.shape == (3, 4, 4)
    finally:
        CTX.remove_hooks()


def test_backpack_is_not_imported_with_the_package():
    code = "import sys, fimprobe; assert 'backpack' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.modules['backpack'] = None\n"
        "import fimprobe\n"
        "try:\n    import fimprobe.engines.backpack\n"
        "except fimprobe.FimprobeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install backpack-for-pytorch" in done.stdout, done.stderr
