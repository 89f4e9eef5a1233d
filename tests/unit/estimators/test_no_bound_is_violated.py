"""Bounds of 1,000 random nets against dense tensors: none is violated, and no report says one is."""

import dataclasses
import math
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import Gaussian
from tests.oracles import brute_force, dense
from tests.support.repetitions import few_or_many

ARCHITECTURES = 40
FREQUENT = {0, 1, 3, 5, 6, 7, 9, 13, 14, 17, 19, 20}
"""Every likelihood with every number of outputs, every activation and depth; the others are long."""

SLACK = 1 + 1e-9
ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ReLU, nn.ELU)


def softmax(h, classes):
    """Probabilities [n, T, C] and scores [n, T, C, C] of every label of each position."""
    p = h.unflatten(1, (-1, classes)).softmax(-1)
    own = p @ (1 - torch.eye(classes))  # 1 − p, with all its digits where p is near 1
    return p, -p.unsqueeze(-2).expand(*p.shape, classes) + torch.diag_embed(own + p)


def bernoulli(h):
    p, q = torch.sigmoid(h), torch.sigmoid(-h)
    return torch.stack([p, q], -1), torch.stack([q, -p], -1).unsqueeze(-1)


def poisson(h, most=60):
    y = torch.arange(float(most))
    rate = h.exp().unsqueeze(-1)
    p = (y * h.unsqueeze(-1) - rate - torch.lgamma(y + 1)).exp()
    return p, (y - rate).unsqueeze(-1)


def gaussian(h, sigma=0.6):
    table = list(brute_force.gaussian_labels(torch.zeros(1), sigma))
    p, score = torch.stack([w for w, _ in table]), torch.stack([d for _, d in table])
    return p.expand(*h.shape, len(p)), score.expand(*h.shape, *score.shape)


FAMILIES = [
    *(("categorical", c, lambda h, c=c: softmax(h, c)) for c in (2, 2, 3, 4, 5)),
    ("positions", 2, lambda h: softmax(h, 2)),
    *(("bernoulli", c, bernoulli) for c in (1, 2, 3)),
    ("poisson", 1, poisson),
    ("poisson", 2, poisson),
    ("gaussian", 1, gaussian),
    ("gaussian", 2, gaussian),
]


class Positions(nn.Module):
    """Two positions that see each other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.cumsum(1))


def architecture(r):
    """Likelihood, table of labels, classes and a net of random depth, width and activation."""
    family, outputs, table = r.choice(FAMILIES)
    widths = [2, *(r.randint(1, 4) for _ in range(r.randint(0, 3))), outputs]
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [r.choice(ACTIVATIONS)()] if i else []
        layers.append(nn.Linear(a, b, bias=r.random() < 0.8))
    classes = outputs if family in ("categorical", "positions") else None
    if family == "positions":
        return "categorical", table, classes, Positions(*layers), (2, 2)
    if family == "gaussian":
        return Gaussian(0.6), table, classes, nn.Sequential(*layers), (2,)
    return family, table, classes, nn.Sequential(*layers), (2,)


def weigh(net, r, gentle):
    """Weights of random size, up to nearly one-hot outputs; now and then all but opposite classes."""
    for p in net.parameters():
        nn.init.normal_(p, std=r.choice([0.2, 0.5, 1.0] if gentle else [0.2, 0.5, 1.0, 3.0]))
    last = list(net.parameters())[-1]
    with torch.no_grad():
        if not gentle:
            last.mul_(r.choice([1.0, 1.0, 5.0]))
        if r.random() < 0.2:
            for p in net.parameters():
                if p.shape[0] == last.shape[0] == 2:
                    p[1] = -0.99 * p[0]


class Dense:
    """J, H, I and M of n nets at once, one input each; methods take the entries of a group."""

    def __init__(self, net, states, x, table, classes):
        names = [n for n, _ in net.named_parameters()]
        shapes = [p.shape for p in net.parameters()]

        def outputs(flat, x):
            parts = flat.split([s.numel() for s in shapes])
            state = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
            return functional_call(net, state, (x,)).flatten()

        self.h = vmap(outputs)(states, x)
        self.jacobian = vmap(jacrev(outputs))(states, x)
        self.hessian = vmap(hessian(outputs))(states, x)
        p, scores = table(self.h)
        count, labels = p.shape[1:]
        picks = torch.cartesian_prod(*[torch.arange(labels)] * count).view(-1, count)
        self.weights = p[:, torch.arange(count), picks].prod(-1)
        self.scores = scores[:, torch.arange(count), picks].flatten(2)
        root = self.weights.sqrt().unsqueeze(-1)
        # I = rᵀr and M = RᵀR
        self.r = torch.linalg.qr(root * self.scores).R
        outer = (self.scores.unsqueeze(-1) * self.scores.unsqueeze(-2)).flatten(2)
        mean = (self.weights.unsqueeze(-1) * outer).sum(1, keepdim=True)
        self.R = torch.linalg.qr(root * (outer - mean)).R
        size = self.h.shape[1]
        self.centre = torch.eye(size)
        if classes is not None:
            block = torch.eye(classes) - 1 / classes
            self.centre = torch.block_diag(*[block] * (size // classes))
        self.label_count = count

    def first(self, index):
        j = self.jacobian[:, :, index]
        gram = j @ j.mT
        pairs = torch.einsum("nac,nbd->nabcd", gram, gram).flatten(3).flatten(1, 2)
        cov = self.R @ pairs @ self.R.mT
        g = self.scores @ j
        w = self.weights.unsqueeze(-1)
        f = (w * g.square()).sum(1)
        fro, low = norm(j), spectral(self.centre @ j)
        found = {
            "trace": f.sum(1),
            "covariance_norm": norm(cov),
            "covariance_spectral_norm": spectral(cov),
            "label_variance": (w * (g.square() - f.unsqueeze(1)).square()).sum((1, 2)),
            "total_label_variance": trace(cov),
            "bound": fro**4 * norm(self.R.mT @ self.R),
            "sharp_bound": low**4 * norm(self.R.mT @ self.R),
            "trace_bound": low**4 * self.R.square().sum((1, 2)),
            "diagonal_bound": j.square().sum(1).square().sum(1) * spectral(self.R) ** 2,
            "high": fro**2 * spectral(self.r) ** 2,
            "low": fro**2 * torch.linalg.eigvalsh(self.r.mT @ self.r)[:, 0],
        }
        if self.label_count == 1 and not torch.equal(self.centre, torch.eye(len(self.centre))):
            most = g.square().amax(1)
            found["diagonal_range_bound"] = (f * (most - f)).sum(1)
        return found

    def quartic(self, index):
        """E‖g‖⁴ at most: what rounding errors of fourth powers are relative to."""
        j = self.jacobian[:, :, index]
        return norm(j) ** 4 * (self.weights * self.scores.square().sum(2).square()).sum(1)

    def second(self, index):
        block = self.hessian[:, :, index][..., index].flatten(2)
        low = self.centre @ block
        cov = (self.r @ block) @ (self.r @ block).mT
        own = self.hessian.diagonal(dim1=2, dim2=3)[..., index]
        fisher = self.r.mT @ self.r
        return {
            "covariance_norm": norm(cov),
            "label_variance": (self.r @ own).square().sum((1, 2)),
            "total_label_variance": trace(cov),
            "bound": norm(block) ** 2 * norm(fisher),
            "sharp_bound": spectral(low) ** 2 * norm(fisher),
            "trace_bound": norm(low) ** 2 * spectral(fisher),
            "diagonal_bound": own.square().sum((1, 2)) * spectral(fisher),
        }


def norm(x):
    return torch.linalg.matrix_norm(x)


def spectral(x):
    return torch.linalg.matrix_norm(x, 2)


def trace(x):
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def holds(small, large, what):
    assert bool((small <= large * SLACK + 1e-300).all()), (what, float((small / large).max()))


def measured(block, each):
    """Reports on some nets of one architecture, their dense truth and the entries of their groups."""
    r = random.Random(block)
    torch.manual_seed(block)
    likelihood, table, classes, net, shape = architecture(r)
    x, plan, reports, states = torch.randn(each, 1, *shape), Plan(), [], []
    for i in range(each):
        weigh(net, r, gentle=likelihood == "poisson")
        states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        options = {"likelihood": likelihood, "draws": "exact", "seed": i, "plan": plan}
        reports.append(fimprobe.measure(net, x[i], **options))
    truth = Dense(net, torch.stack(states), x, table, classes)
    return reports, truth, brute_force.groups(net)


@pytest.mark.parametrize("each", few_or_many(8, 25))
@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=() if b in FREQUENT else pytest.mark.long) for b in range(ARCHITECTURES)],
)
def test_no_bound_is_violated_on_random_nets(block, each, double):
    reports, truth, groups = measured(block, each)
    assert [line for r in reports for line in r.advice if "VIOLATED" in line] == []
    # of a label with two even outcomes little is left of E‖g‖⁴ − ‖F‖²: digits of the former count
    for key, index in groups.items():
        want = truth.first(index)
        quartic = truth.quartic(index)
        for kind, value in want.items():
            found = [brute_force.group_of(r, key).i1 for r in reports]
            have = [
                e.trace_range[kind == "high"] if kind in ("low", "high") else getattr(e, kind)
                for e in found
            ]
            if have[0] is None:  # one output: Γ is a number, of which i1 makes no matrix total
                assert kind == "total_label_variance" and truth.h.shape[1] == 1
                continue
            scale = want["high"] if kind in ("low", "high", "trace") else quartic
            error = (torch.tensor(have) - value).abs()
            limit = 1e-9 * value + 1e-13 * scale
            if kind in ("bound", "sharp_bound"):  # digits of ‖M‖², which goes to zero
                limit = torch.maximum(limit, 1e-14 * scale.square() / value.clamp(min=1e-300))
            assert bool((error <= limit + 1e-300).all()), (key, kind)
        slack = 1e-13 * quartic
        holds(want["covariance_spectral_norm"], want["covariance_norm"] + slack, key)
        holds(want["low"], want["trace"] + 1e-13 * want["high"], key)
        holds(want["trace"], want["high"], key)
        for one in (want, truth.second(index)):
            holds(one["covariance_norm"], one["sharp_bound"] + slack, key)
            holds(one["sharp_bound"], one["bound"] + slack, key)
            holds(one["total_label_variance"], one["trace_bound"] + slack, key)
            holds(one["label_variance"], one["diagonal_bound"] + slack, key)
        if "diagonal_range_bound" in want:
            holds(want["label_variance"], want["diagonal_range_bound"] + slack, key)


# -- what is said of it ------------------------------------------------------------------------------


def shouts(report):
    return [line for line in report.advice if "VIOLATED" in line]


def with_total(report, kind, **values):
    e = dataclasses.replace(getattr(report.total, kind), **values)
    return dataclasses.replace(report, total=dataclasses.replace(report.total, **{kind: e}))


@pytest.mark.parametrize("kind", ["i1", "i2"])
def test_advice_shouts_at_a_value_above_its_bound(kind, double):
    setting, _ = dense.setting("categorical")
    options = {"likelihood": "categorical", "draws": "exact", "second_order": {"probes": 40}}
    report = fimprobe.measure(setting.model, setting.args, **options)
    assert not shouts(report)
    e = getattr(report.total, kind)
    most = max(e.bound + 4 * (e.bound_error or 0.0), e.sharp_bound)
    factor = 1 if kind == "i1" else 2  # Î₂'s norm is itself an estimate
    (line,) = shouts(with_total(report, kind, covariance_norm=1.1 * factor * most))
    assert "in the model (" in line and not shouts(
        with_total(report, kind, covariance_norm=0.9 * most)
    )
    # a bound that is itself uncertain is given four of its standard errors
    for value, error, told in ((1.1, 0.0, 1), (2.9, 0.5, 0), (3.1, 0.5, 1), (3.1, 2.0, 0)):
        values = {"bound": most, "sharp_bound": most, "bound_error": error * most}
        made = with_total(report, kind, covariance_norm=value * factor * most, **values)
        assert len(shouts(made)) == told, (value, error)
    layer = report.layers["0"]
    wrong = dataclasses.replace(getattr(layer, kind), covariance_norm=math.inf)
    layers = {**report.layers, "0": dataclasses.replace(layer, **{kind: wrong})}
    (line,) = shouts(dataclasses.replace(report, layers=layers))
    assert "in 0 (" in line and "the model (" not in line
    # a bound that is not known is above nothing
    unknown = dataclasses.replace(getattr(layer, kind), covariance_norm=math.inf, bound=None)
    layers = {**report.layers, "0": dataclasses.replace(layer, **{kind: unknown})}
    assert not shouts(dataclasses.replace(report, layers=layers))


def noisy(outputs, probes):
    """Reports of one input with few probes, and the groups of its net."""
    torch.manual_seed(0)
    net = dense.lively(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh()))
    net.append(dense.lively(nn.Linear(3, outputs)))
    family = "categorical" if outputs > 1 else "bernoulli"
    options = {"likelihood": family, "draws": "exact", "second_order": {"probes": probes}}
    x, plan = torch.randn(1, 2), Plan()
    return brute_force.groups(net), [
        fimprobe.measure(net, x, seed=seed, plan=plan, **options) for seed in range(12)
    ]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("probes", [2, 4])
def test_advice_keeps_quiet_where_a_bound_is_noise(outputs, probes, double, raw_numbers):
    """The probes' noise takes a block's (18) below its norm, and below zero; no error of ours."""
    groups, reports = noisy(outputs, probes)
    low = 0
    for report in reports:
        assert not shouts(report)
        for key in groups:
            e = brute_force.group_of(report, key).i2
            if outputs > 1:
                assert e.covariance_norm <= e.sharp_bound * (1 + 1e-9) + 1e-18
            low += e.bound < e.covariance_norm / 2
    assert low > 0


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("probes", [2, 4])
def test_a_bound_that_is_noise_is_not_shown(outputs, probes, double):
    """Of Î₂ a bound stands at twice its own error at least, or is None with the reason."""
    groups, reports = noisy(outputs, probes)
    shown = gone = 0
    for report in reports:
        assert not shouts(report)
        for key in groups:
            e = brute_force.group_of(report, key).i2
            for kind in ("bound", "trace_bound"):
                value = getattr(e, kind)
                if value is None:
                    assert "noise" in e.unknown[kind], kind
                    gone += 1
                else:
                    assert value >= 0 and kind not in e.unknown
                    assert kind != "bound" or value >= 2 * (e.bound_error or 0.0)
                    shown += 1
    assert shown > 0 and gone > 0


@pytest.mark.parametrize("scale", [1e-1, 3e-3, 1e-4, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize("size", [1, 6])
def test_advice_keeps_quiet_at_even_odds(size, scale):
    """A fresh softmax of two classes in float32: M is zero at even odds, and ‖Cov Î₁‖ is rounding."""
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        with torch.no_grad():
            for p in net[2].parameters():
                p.mul_(scale)
        x = torch.randn(size, 3)
        report = fimprobe.measure(net, x, likelihood="categorical", draws="exact", estimators=("i1",))
        assert not shouts(report)
