"""Second derivatives against dense Hessians, finite differences and orthogonal arrays of signs."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.estimators.i2 import block_gram, label_variance, probe_error, whole_gram
from fimprobe.model.twin import make_twin
from tests.models.cases import CASES, Lambda, head, lively
from tests.oracles import brute_force
from tests.support.curvature import TooFew, orthogonal_measurement, problem_of, seeds_of


def oracle_model(name, model, problem):
    """A model whose double backward torch gets right (see the tests of weight norm and bags below)."""
    if name in ("parametrised", "old weight norm", "weight norm"):
        return problem.twin
    return brute_force.without_bags(copy.deepcopy(model)) if name.startswith("bag") else model


def bent_norms(problem, found, bent):
    """The worst relative difference between ``whole`` [n, n] and ⟨(R_y u)_θ, (R_z u)_θ⟩, by name."""
    worst = {}
    largest = float(bent.square().sum(-1).max())
    for name, span in brute_force.spans(problem.twin).items():
        mine = bent[..., span]
        want = mine @ mine.transpose(1, 2)
        if name not in found.parameters:
            assert float(want.abs().max()) == 0, name
            continue
        have = found.parameters[name].whole[0]
        scale = max(float(want.abs().max()), 1e-9 * largest)
        worst[name] = float((have - want).abs().max()) / scale if scale else float(have.abs().max())
    return worst


@pytest.mark.parametrize("name", [n for n in CASES if n != "bag max"])
def test_whole_equals_double_backward_and_differences(name, double):
    case = CASES[name]()
    model = case.model.eval()
    problem = problem_of(model, case.inputs, likelihood="categorical", bounds=True)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.notes == []
    seeds = seeds_of(problem)
    assert len(seeds) == case.positions * case.classes + 2  # the last two are for ‖H‖
    assert measured.curvature.draws == case.positions * case.classes
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    bent = brute_force.bent(oracle_model(name, model, problem), case.inputs, seeds, u)
    worst = bent_norms(problem, measured.curvature, bent)
    assert worst and max(worst.values()) < 1e-9, worst
    # torch's double backward is itself checked: first-order gradients of the user's own model
    few = [0, len(seeds) - 1]
    slopes = brute_force.bent_by_differences(model, case.inputs, [seeds[y] for y in few], u)
    assert (slopes - bent[:, few]).abs().max() <= 1e-6 * bent.abs().max() + 1e-9


@pytest.mark.parametrize("name", ["bag max", "Hardsigmoid"])
def test_what_torch_cannot_differentiate_twice_is_told(name):
    model, inputs = CASES[name]()[:2] if name in CASES else activation(name)
    problem = problem_of(model.eval(), inputs)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.curvature is None
    assert "Î₂ was not measured: the model has no second derivative" in measured.notes[0]


SHAPED = {"GLU": ((), 4), "Softmax": ((-1,), 5), "Threshold": ((0.1, 0.3), 5)}
SHAPED |= {"Softmin": ((-1,), 5), "LogSoftmax": ((-1,), 5)}
ACTIVATIONS = {
    name: (*SHAPED.get(name, ((), 5)),)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax2d", "RReLU")
}


def activation(name):
    """Two layers around it, so that the second moves with the first."""
    options, width = ACTIVATIONS[name]
    layer = getattr(nn, name)(*options)
    model = nn.Sequential(
        nn.Linear(4, width), layer, nn.Linear(width // 2 if name == "GLU" else width, 3)
    )
    return lively(model), (torch.randn(2, 4),)


class Attending(nn.Module):
    """Softmax attention written by hand."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v).sum(1)


def behind(layer, *shape, width):
    """A layer between a layer and a head."""
    first = nn.Linear(shape[-1], shape[-1])
    model = lively(
        nn.Sequential(first, nn.Tanh(), layer, nn.Sigmoid(), nn.Flatten(), nn.Linear(width, 3))
    )
    return model, (torch.randn(2, *shape),)


def running(layer, *shape, width):
    """The same with statistics of a few batches."""
    model, args = behind(layer, *shape, width=width)
    for _ in range(3):
        model.train()(torch.randn(8, *shape))
    return model, args


def recurring(kind):
    layer = kind(3, 2, batch_first=True, num_layers=2)
    return lively(
        Lambda(lambda self, x: self.parts[1](self.parts[0](x)[0][:, -1]), layer, nn.Linear(2, 3))
    ), (torch.randn(2, 3, 3),)


MODULES = {
    **{
        f"activation {name}": lambda name=name: activation(name)
        for name in ACTIVATIONS
        if name != "Hardsigmoid"
    },
    "Softmax2d": lambda: behind(nn.Softmax2d(), 2, 3, 3, width=18),
    "LayerNorm": lambda: behind(nn.LayerNorm(4), 3, 4, width=12),
    "RMSNorm": lambda: behind(nn.RMSNorm(4), 3, 4, width=12),
    "GroupNorm": lambda: behind(nn.GroupNorm(2, 4), 4, 3, width=12),
    "InstanceNorm": lambda: behind(nn.InstanceNorm1d(2, affine=True), 2, 5, width=10),
    "BatchNorm": lambda: running(nn.BatchNorm1d(2), 2, 3, width=6),
    "LocalResponseNorm": lambda: behind(nn.LocalResponseNorm(2), 3, 4, width=12),
    "Conv1d": lambda: behind(nn.Conv1d(2, 3, 3, padding=1), 2, 4, width=12),
    "Conv2d": lambda: behind(nn.Conv2d(2, 2, 2, stride=2), 2, 4, 4, width=8),
    "ConvTranspose1d": lambda: behind(nn.ConvTranspose1d(2, 2, 2, stride=2), 2, 3, width=12),
    "Conv3d": lambda: behind(nn.Conv3d(1, 2, 2), 1, 2, 3, 3, width=8),
    "AvgPool": lambda: behind(nn.AvgPool1d(2), 2, 4, width=4),
    "MaxPool": lambda: behind(nn.MaxPool2d(2), 1, 4, 4, width=4),
    "LPPool": lambda: behind(nn.LPPool1d(2.0, 2), 2, 4, width=4),
    "AdaptiveAvgPool": lambda: behind(nn.AdaptiveAvgPool1d(3), 2, 4, width=6),
    "Bilinear": lambda: (
        lively(
            Lambda(
                lambda self, x: self.parts[1](self.parts[0](x, x.tanh())),
                nn.Bilinear(3, 3, 2),
                nn.Linear(2, 3),
            )
        ),
        (torch.randn(2, 3),),
    ),
    "attention": lambda: (lively(Attending()), (torch.randn(2, 3, 4),)),
    "LSTM": lambda: recurring(nn.LSTM),
    "GRU": lambda: recurring(nn.GRU),
    "RNN": lambda: recurring(nn.RNN),
    "CosineSimilarity": lambda: (
        lively(
            Lambda(
                lambda self, x: torch.stack(
                    [torch.cosine_similarity(self.parts[i](x), x, -1) for i in range(3)], 1
                ),
                *(nn.Linear(4, 4) for _ in range(3)),
            )
        ),
        (torch.randn(2, 4),),
    ),
    "softmax cross attention": lambda: (
        lively(
            Lambda(
                lambda self, x: self.parts[1](self.parts[0](x, x, x, need_weights=False)[0]).mean(1),
                nn.MultiheadAttention(4, 2, batch_first=True),
                nn.Linear(4, 3),
            )
        ),
        (torch.randn(2, 3, 4),),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_equals_finite_differences(name, double):
    model, args = MODULES[name]()
    model.eval()
    problem = problem_of(model, args)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.notes == []
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    slopes = brute_force.bent_by_differences(model, args, seeds_of(problem), u)
    assert slopes.abs().max() > 1e-3  # the net bends: nothing is compared with zero alone
    worst = bent_norms(problem, measured.curvature, slopes)
    assert len(worst) == len(problem.parameters) and max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize("name", ["parametrised", "old weight norm"])
def test_weight_norm_needs_to_be_written_out(name, double):
    """torch's fused weight norm has another second derivative in v than finite differences."""
    case = CASES[name]()
    model, twin = case.model.eval(), make_twin(case.model)
    seeds = [torch.randn(len(case.inputs[0]), 3)]
    u = torch.randn(sum(p.numel() for p in model.parameters()))
    slopes = brute_force.bent_by_differences(model, case.inputs, seeds, u)
    right = brute_force.bent(twin, case.inputs, seeds, u)
    wrong = brute_force.bent(model, case.inputs, seeds, u)
    scale = slopes.abs().max()
    assert (right - slopes).abs().max() < 1e-7 * scale
    assert (wrong - slopes).abs().max() > 1e-3 * scale, "torch has mended it: twin.py need not mind"


class Scaled(nn.Module):
    """Raw parameters that bend by themselves, replayed."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.sin(x * self.scale.exp() + self.shift) * self.shift


def tied_embedding():
    """Embedding and decoder share a weight, and a Linear is used twice."""
    embedding, twice = nn.Embedding(3, 2), nn.Linear(2, 2)
    decode = nn.Linear(2, 3, bias=False)
    decode.weight = embedding.weight
    model = Lambda(
        lambda self, t: self.parts[2](
            self.parts[1](torch.tanh(self.parts[1](self.parts[0](t).tanh()))).sum(1)
        ),
        embedding,
        twice,
        decode,
    )
    return lively(model), (torch.randint(3, (2, 2)),)


def looped():
    """A module that reads a number from its input: vmap cannot run it."""

    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(2))

        def forward(self, x):
            return torch.sin(x * self.a) * (2.0 if float(x.detach().sum()) > 1e6 else 1.0)

    return lively(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Looped(), nn.Linear(2, 2))), (
        torch.randn(2, 2),
    )


def bias_only_twice():
    """A module's raw parameter used in two calls of one module."""
    scaled = Scaled()
    model = Lambda(
        lambda self, x: self.parts[1](self.parts[0](self.parts[0](x))), scaled, nn.Linear(2, 2)
    )
    return lively(model), (torch.randn(2, 2),)


def small_recurrent(kind, width):
    layer = kind(width, width, batch_first=True)
    return lively(
        Lambda(lambda self, x: self.parts[1](self.parts[0](x)[0][:, -1]), layer, nn.Linear(width, 2))
    ), (torch.randn(2, 3, width),)


def whole_replayed():
    def f(self, x):
        y = torch.tanh(self.parts[0](x))
        return nn.functional.linear(y, self.parts[0].weight) @ self.parts[1].weight.T

    return lively(Lambda(f, nn.Linear(2, 2), nn.Linear(2, 2, bias=False))), (torch.randn(2, 2),)


TINY = {
    "linear": lambda: (
        lively(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))),
        (torch.randn(2, 3),),
    ),
    "sequence": lambda: (
        lively(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))),
        (torch.randn(2, 3, 2),),
    ),
    "conv": lambda: (
        lively(nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), head(8))),
        (torch.randn(2, 1, 4, 4),),
    ),
    "lookup": lambda: (
        lively(nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))),
        (torch.tensor([[1, 1], [2, 0]]),),
    ),
    "norms": lambda: behind(nn.LayerNorm(3), 3, width=3),
    "bilinear": lambda: (
        lively(
            Lambda(
                lambda self, x: self.parts[1](torch.tanh(self.parts[0](x, x))),
                nn.Bilinear(2, 2, 2),
                nn.Linear(2, 2),
            )
        ),
        (torch.randn(2, 2),),
    ),
    "square Conv1D": lambda: (
        lively(
            nn.Sequential(Conv1D(3, 3), nn.Tanh(), Conv1D(2, 3))
        ),  # [in, out] looks like [out, in]
        (torch.randn(2, 3),),
    ),
    "weight norm": lambda: (
        lively(
            nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Tanh(), nn.Linear(2, 2)
            )
        ),
        (torch.randn(2, 2),),
    ),
    "reused": lambda: (
        lambda a: (
            lively(nn.Sequential(a, nn.Tanh(), a, nn.Tanh(), nn.Linear(3, 2))),
            (torch.randn(2, 3),),
        )
    )(nn.Linear(3, 3)),
    "tied embedding": tied_embedding,
    "lstm": lambda: small_recurrent(nn.LSTM, 1),
    "gru": lambda: small_recurrent(nn.GRU, 1),
    "replayed": lambda: (
        lively(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Scaled(), nn.Linear(2, 2))),
        (torch.randn(2, 2),),
    ),
    "replayed twice": bias_only_twice,
    "loop": looped,
    "whole model": whole_replayed,
    "attention": lambda: (
        lively(
            Lambda(
                lambda self, x: self.parts[1](self.parts[0](x, x, x, need_weights=False)[0].sum(1)),
                nn.MultiheadAttention(2, 1, batch_first=True),
                nn.Linear(2, 2),
            )
        ),
        (torch.randn(2, 2, 2),),
    ),
}


def near(have, want, scale=0.0, rtol=1e-9):
    """Equal within ``rtol`` of the largest entry, or of ``scale``."""
    bound = rtol * max(float(want.abs().max()), scale) + 1e-15
    assert have.shape == want.shape and float((have - want).abs().max()) <= bound, (have, want)


# (parameters, outputs of layers) are few enough here for dense Hessians and one array
SMALL = [
    *("mlp", "linear on sequences", "bilinear", "conv1d", "conv1d same dilated"),
    *(
        "embedding padding_idx",
        "embedding [1, T] index, T = B",
        "bag sum",
        "bag mean",
        "bag weighted",
    ),
    *("layer norm", "layer norm 2d", "rms norm", "rms norm of one's own", "group norm 2-D"),
    *("batch norm", "batch norm 1d", "batch norm 1d sequence", "multihead batch first"),
    *("multihead sequence first", "multihead kdim", "rnn relu no bias", "attention net"),
    *("transformers Conv1D", "lora", "subclass", "parametrised"),
    *("old weight norm", "functional tie", "tied and reused", "folded frames", "time-major fold"),
    *("shared deltas", "scalar parameter", "tied to a raw parameter", "parameter list"),
]


@pytest.mark.parametrize("name", [*TINY, *SMALL])
def test_diagonal_is_exact_over_an_orthogonal_array(name, monkeypatch, double):
    """The mean over all probes is diag R; ``square`` leaves the probes' own squares out."""
    model, args = TINY[name]() if name in TINY else CASES[name]()[:2]
    draws = 1 if name in SMALL else 2
    problem = problem_of(model.eval(), args, likelihood="gaussian", draws=draws, diagonals=True)
    found, probes = None, 8
    while found is None:
        probes *= 2
        problem.request = replace(problem.request, probes=probes)
        with contextlib.suppress(TooFew):
            found = orthogonal_measurement(monkeypatch, problem, diagonal=probes)
    dense = brute_force.hessians(oracle_model(name, model, problem), args, seeds_of(problem))
    dense = dense.diagonal(dim1=2, dim2=3)
    scale = float(dense.abs().max())
    for n, span in brute_force.spans(model).items():
        want = dense[..., span]
        if n not in found.parameters:
            assert float(want.abs().max()) == 0, n
            continue
        have = found.parameters[n]
        near(have.trace, want.sum(-1), scale)
        own = have.probe_squares.sum(-1)
        mean_square = (have.square * probes * (probes - 1) + own) / probes**2
        near(mean_square, want.square().sum(-1), scale**2)
        near(have.diagonal.flatten(), want.sum((0, 1)) / draws, scale)
        # r_k has the mean R_ii: no probe's own square is below it on average
        assert (own / probes - want.square().sum(-1) > -1e-9 * scale**2 - 1e-13).all()


@pytest.mark.parametrize("name", [n for n in TINY if n != "weight norm"])
def test_blocks_are_exact_over_an_orthogonal_array(name, monkeypatch, double):
    """Mean over u and σ: ⟨R_y, R_z⟩ of every parameter's and every layer's block, and of the whole."""
    model, args = TINY[name]()
    problem = problem_of(model.eval(), args, exact=True)  # no probes of the diagonal
    monkeypatch.setattr("fimprobe.engines.backpack.hessian_diagonals", lambda *a, **k: {})
    numel = sum(p.numel() for p in problem.parameters.values())
    direction = 1 << (numel - 1).bit_length()
    flip = 1 << (len(problem.parameters) - 1).bit_length()
    problem.request = replace(problem.request, probes=direction * flip)
    found = orthogonal_measurement(monkeypatch, problem, direction=direction, flip=flip)
    bent = brute_force.hessians(oracle_model(name, model, problem), args, seeds_of(problem))
    near(whole_gram(found).mean(0), torch.einsum("byij,bzij->byz", bent, bent))
    spans, layers = brute_force.spans(model), {}
    for n in spans:
        layers.setdefault(n.rpartition(".")[0], []).append(n)
    groups = [[n] for n in spans] + [names for names in layers.values() if len(names) > 1]
    for names in groups:
        index = torch.cat([torch.arange(spans[n].start, spans[n].stop) for n in names])
        block = bent[:, :, index][:, :, :, index]
        near(block_gram(found, names).mean(0), torch.einsum("byij,bzij->byz", block, block))


def many_copies(net, copies=3000, probes=2):
    """Each copy of one input has probes of its own: one measurement is many replicates."""
    problem = problem_of(
        net, torch.randn(1, 3).expand(copies, -1).clone(), probes=probes, likelihood="categorical"
    )
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    return problem, measured.curvature


@pytest.mark.parametrize("probes", [2, 4])
def test_probe_error_is_the_spread_of_replicates(probes, double):
    net = lively(
        nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    )
    problem, found = many_copies(net, probes=probes)
    weights = found.weights
    dense = brute_force.hessians(
        net, (problem.batch.args[0][:1],), [s[:1] for s in seeds_of(problem)]
    )
    compared = 0
    for n, span in brute_force.spans(net).items():
        part = found.parameters[n]
        want = dense[0].diagonal(dim1=1, dim2=2)[:, span].square().sum(-1) @ weights[0]
        each = (part.square * weights).sum(-1)
        assert float(each.mean()) == pytest.approx(
            float(label_variance(part.square, weights)), rel=1e-12
        )
        error = float(each.std()) / len(each) ** 0.5
        assert abs(float(each.mean() - want)) <= 4 * error + 1e-14, n
        told = float(probe_error(part.probe_squares, weights))  # of the mean over the copies
        if n in ("4.weight", "4.bias"):
            assert told == 0 and error == 0
            continue
        compared += 1
        if probes == 2:
            assert 0.75 < told / error < 1.35, (n, told / error)
        else:
            assert told > 0.9 * error, (n, told / error)
    assert compared == 4
