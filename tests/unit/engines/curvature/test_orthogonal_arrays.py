"""Second derivatives over all probes of an orthogonal array of signs, against dense Hessians."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.curvature import norm_curvature, propagation_check
from fimprobe.estimators.i2 import block_grams, whole_gram
from tests.models.cases import CASES, Lambda, head, lively
from tests.oracles import brute_force
from tests.support.curvature import (
    TooFew,
    behind,
    oracle_model,
    orthogonal_measurement,
    problem_of,
    seeds_of,
)


def bare(width, outputs):
    """A layer without a bias: every power of two of entries and parameters doubles the probes."""
    return nn.Linear(width, outputs, bias=False)


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


class Looped(nn.Module):
    """Reads a number from its input: vmap cannot run it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.sin(x * self.a) * (2.0 if float(x.detach().sum()) > 1e6 else 1.0)


def bias_only_twice():
    """A module's raw parameter used in two calls of one module."""
    scaled = Scaled()
    model = Lambda(lambda self, x: self.parts[1](self.parts[0](self.parts[0](x))), scaled, bare(2, 2))
    return lively(model), (torch.randn(2, 2),)


def small_recurrent(kind, width):
    layer = kind(width, width, batch_first=True)
    return lively(
        Lambda(lambda self, x: self.parts[1](self.parts[0](x)[0][:, -1]), layer, nn.Linear(width, 2))
    ), (torch.randn(2, 3, width),)


def attending(attention, last, width):
    def f(self, x):
        return self.parts[1](self.parts[0](x, x, x, need_weights=False)[0].sum(1))

    return lively(Lambda(f, attention, last)), (torch.randn(2, 2, width),)


def whole_replayed():
    def f(self, x):
        y = torch.tanh(self.parts[0](x))
        return nn.functional.linear(y, self.parts[0].weight) @ self.parts[1].weight.T

    return lively(Lambda(f, nn.Linear(2, 2), bare(2, 1))), (torch.randn(2, 2),)


class Block(nn.Module):
    """A transformer's block with its norms before attention and the MLP, or after them."""

    def __init__(self, norm, first=True, width=3):
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.keys, self.mlp = bare(width, 3 * width), bare(width, width)
        self.first = first

    def attend(self, x):
        q, k, v = self.keys(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v

    def forward(self, x):
        if self.first:
            x = x + self.attend(self.norms[0](x))
            return x + nn.functional.gelu(self.mlp(self.norms[1](x)))
        x = self.norms[0](x + self.attend(x))
        return self.norms[1](x + torch.tanh(self.mlp(x)))


class WrittenRMSNorm(nn.Module):
    """As transformers write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


def language_model(norm, first=True):
    """Tokens through a block to a head that shares the embedding's weight."""
    embedding, block = nn.Embedding(3, 3), Block(norm, first)

    def forward(self, t):
        x = self.parts[2](self.parts[1](self.parts[0](t)))
        return self.parts[3](x).sum(1)

    decode = bare(3, 3)
    decode.weight = embedding.weight
    return lively(Lambda(forward, embedding, block, norm(3), decode)), (
        torch.tensor([[1, 0], [2, 2]]),
    )


def around(forward, *parts, shape=(2, 2, 3)):
    """Layers on floats."""
    return lively(Lambda(forward, *parts)), (torch.randn(shape),)


NORMS = {
    "norm first": lambda: language_model(nn.LayerNorm),
    "norm last": lambda: language_model(nn.LayerNorm, first=False),
    "RMSNorm first": lambda: language_model(nn.RMSNorm),
    "written RMSNorm last": lambda: language_model(WrittenRMSNorm, first=False),
    "norm read elsewhere": lambda: around(
        lambda self, x: self.parts[2](self.parts[1](y := self.parts[0](x)) * y).sum(1),
        bare(3, 3), nn.LayerNorm(3), bare(3, 2),
    ),
    "norm after norm": lambda: around(
        lambda self, x: self.parts[3](self.parts[2](self.parts[1](self.parts[0](x)))).sum(1),
        bare(3, 3), nn.RMSNorm(3), nn.LayerNorm(3), bare(3, 2),
    ),
    "norm with a computed weight": lambda: around(
        lambda self, x: self.parts[2](
            nn.functional.layer_norm(
                self.parts[0](x), (3,), weight=1 + self.parts[1](x[0].mean(0)).tanh()
            )
        ).sum(1),
        bare(3, 3), bare(3, 3), bare(3, 2), shape=(1, 2, 3),
    ),
    "rate of something else": lambda: around(
        lambda self, x: self.parts[2](
            (y := self.parts[0](x))
            * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.parts[1](x).exp().mean(-1, keepdim=True))
        ).sum(1),
        bare(3, 3), bare(3, 3), bare(3, 2),
    ),
    "norm over two dimensions": lambda: around(
        lambda self, x: self.parts[2](self.parts[1](self.parts[0](x)).tanh()).sum(1),
        bare(3, 3), nn.LayerNorm((2, 3), elementwise_affine=False), bare(3, 2),
    ),
    "group norm": lambda: around(
        lambda self, x: self.parts[3](
            self.parts[2](self.parts[1](self.parts[0](x)).tanh()).transpose(1, 2)
        ).sum(1),
        bare(3, 4), nn.LayerNorm(4), nn.GroupNorm(1, 2), bare(2, 2),
    ),
    "block used twice": lambda: around(
        lambda self, x: self.parts[1](self.parts[0](self.parts[0](x))).sum(1),
        nn.Sequential(nn.LayerNorm(3), bare(3, 3), nn.Tanh()), bare(3, 2),
    ),
    "norm after recurrence": lambda: around(
        lambda self, x: self.parts[2](self.parts[1](self.parts[0](x)[0])).sum(1),
        nn.GRU(2, 3, batch_first=True, bias=False), nn.LayerNorm(3), bare(3, 2), shape=(2, 2, 2),
    ),
    "replayed before a norm": lambda: around(
        lambda self, x: self.parts[3](self.parts[2](self.parts[1](self.parts[0](x))).tanh()).sum(1),
        bare(2, 2), Scaled(), nn.LayerNorm(2), bare(2, 2), shape=(2, 2, 2),
    ),
}  # fmt: skip
"""Models with norms, whose curvature is propagated."""

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
        lively(nn.Sequential(bare(2, 2), nn.Tanh(), Scaled(), bare(2, 2))),
        (torch.randn(2, 2),),
    ),
    "replayed twice": bias_only_twice,
    "loop": lambda: (
        lively(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Looped(), nn.Linear(2, 2))),
        (torch.randn(2, 2),),
    ),
    "whole model": whole_replayed,
    "attention": lambda: attending(nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 2), 2),
}
TINIEST = {
    "loop": lambda: (lively(nn.Sequential(Looped(), bare(2, 1))), (torch.randn(2, 2),)),
    "attention": lambda: attending(
        nn.MultiheadAttention(1, 1, batch_first=True, bias=False), bare(1, 1), 1
    ),
    "norms": lambda: (
        lively(nn.Sequential(bare(2, 3), nn.LayerNorm(3), nn.Tanh(), bare(3, 1))),
        (torch.randn(2, 2),),
    ),
}
"""Fewer parameters: the probes of their blocks are a few dozen."""


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


# these take the most probes: a sibling of each stays, in the blocks one of ``TINIEST``, a GRU and Scaled
LONG_DIAGONALS = ["weight norm", "attention net", "rnn relu no bias", "multihead sequence first"]
LONG_DIAGONALS += ["multihead kdim", "replayed twice", "RMSNorm first", "written RMSNorm last"]
LONG_BLOCKS = ["lstm", "replayed twice", "loop", "attention", "norms"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.long if n in LONG_DIAGONALS else ())
        for n in (*TINY, *NORMS, *SMALL)
    ],
)
def test_diagonal_is_exact_over_an_orthogonal_array(name, monkeypatch, double):
    """The mean over all probes is diag R; ``square`` leaves the probes' own squares out."""
    model, args = (TINY | NORMS)[name]() if name in TINY | NORMS else CASES[name]()[:2]
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


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("norm first", True),
        ("written RMSNorm last", True),
        ("block used twice", True),
        ("norm read elsewhere", None),
        ("rate of something else", None),
        ("linear", None),
    ],
)
def test_curvature_is_propagated_where_norms_separate_regions(name, used, double):
    model, args = (TINY | NORMS)[name]()
    problem = problem_of(model.eval(), args, likelihood="gaussian", draws=1, probes=2)
    plan = make_verified_plan(problem)
    assert measure_with_fallbacks(problem, plan).curvature is not None
    assert plan.propagates is used


def test_sources_that_disagree_with_a_double_backward_are_not_used(monkeypatch, double):
    def one_percent_more(norm, cotangent, direction):
        return 1.01 * norm_curvature.curvature_along(norm, cotangent, direction)

    monkeypatch.setattr(propagation_check, "curvature_along", one_percent_more)
    model, args = NORMS["norm first"]()
    problem = problem_of(model.eval(), args, likelihood="gaussian", draws=1, probes=2)
    plan = make_verified_plan(problem)
    assert measure_with_fallbacks(problem, plan).curvature is not None
    assert plan.propagates is False


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(n, marks=pytest.mark.long if n in LONG_BLOCKS else ())
            for n in TINY
            if n != "weight norm"
        ),
        *(f"tiniest {n}" for n in TINIEST),
    ],
)
def test_blocks_are_exact_over_an_orthogonal_array(name, monkeypatch, double):
    """Mean over u and σ: ⟨R_y, R_z⟩ of every parameter's and every layer's block, and of the whole."""
    tiniest = name.startswith("tiniest ")
    model, args = TINIEST[name.removeprefix("tiniest ")]() if tiniest else TINY[name]()
    problem = problem_of(model.eval(), args, exact=True)  # no probes of the diagonal
    monkeypatch.setattr("fimprobe.engines.backpack.hessian_sums", lambda *a, **k: {})
    numel = sum(p.numel() for p in problem.parameters.values())
    direction = 1 << (numel - 1).bit_length()
    flip = 1 << (len(problem.parameters) - 1).bit_length()
    problem.request = replace(problem.request, probes=direction * flip)
    found = orthogonal_measurement(monkeypatch, problem, direction=direction, flip=flip)
    bent = brute_force.hessians(oracle_model(name, model, problem), args, seeds_of(problem))
    assert float(bent.abs().max()) > 1e-2
    near(whole_gram(found).mean(0), torch.einsum("byij,bzij->byz", bent, bent))
    spans, layers = brute_force.spans(model), {}
    for n in spans:
        layers.setdefault(n.rpartition(".")[0], []).append(n)
    groups = [[n] for n in spans] + [names for names in layers.values() if len(names) > 1]
    for names in groups:
        index = torch.cat([torch.arange(spans[n].start, spans[n].stop) for n in names])
        block = bent[:, :, index][:, :, :, index]
        gram = block_grams(found, {"block": names})[:, 0]
        near(gram.mean(0), torch.einsum("byij,bzij->byz", block, block))
