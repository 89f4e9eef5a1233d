"""Everything that is made of size-biased labels is unbiased: against enumeration, sure or unsure.

At a sure model the likeliest label has the probability 0.999 and labels drawn from the model are
nearly always that one: what follows from them is far off, or has errors of hundreds of per cent.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from tests.models.cases import lively
from tests.oracles import brute_force
from tests.oracles.dense import mean
from tests.support.repetitions import limit

pytestmark = pytest.mark.usefixtures("double", "raw_numbers")

SURE = math.log(999)
SEEDS = 16


class Setting(NamedTuple):
    model: nn.Sequential
    x: Tensor
    likelihood: str
    keep: Tensor
    """Of the labels of one input, for every input."""
    copies: int = 60
    """Of each input in a measurement."""


class Flat(nn.Module):
    """Positions see each other."""

    def forward(self, x):
        return torch.tanh(x.cumsum(1))


def net(outputs):
    torch.manual_seed(3)
    return lively(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, outputs)))


def towards(model, bias):
    """Outputs moved by ``bias``, and what the inputs change in them made small beside it."""
    with torch.no_grad():
        model[-1].bias += torch.tensor(bias)
    return model


def categorical(sure):
    model = towards(net(3), [SURE + 1, 0.0, 0.5] if sure else [0.0] * 3)
    return Setting(model, torch.randn(3, 3), "categorical", torch.ones(3, dtype=torch.bool))


def tokens(sure):
    torch.manual_seed(3)
    model = lively(nn.Sequential(nn.Linear(2, 2), Flat(), nn.Linear(2, 3)))
    model = towards(model, [0.0, SURE + 1, 0.0] if sure else [0.0] * 3)
    keep = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    return Setting(model, torch.randn(3, 3, 2), "categorical", keep)


def bernoulli(sure):
    model = towards(net(3), [SURE, -SURE, SURE - 1] if sure else [0.0] * 3)
    return Setting(model, torch.randn(3, 3), "bernoulli", torch.ones(3, 3, dtype=torch.bool))


def poisson(sure):
    # many copies: a count of two, which few draws of a sure model show, has its share of E g⁴
    model = towards(net(2), [-SURE, -SURE + 1] if sure else [0.3, -0.3])
    return Setting(model, torch.randn(3, 3), "poisson", torch.ones(3, 2, dtype=torch.bool), 300)


MAKERS = {f.__name__: f for f in (categorical, tokens, bernoulli, poisson)}


def labels_of(setting, b):
    """Every labelling of an input, with scores of zero where the mask leaves labels out."""

    def labels(h):
        keep = setting.keep[b]
        if setting.likelihood == "categorical" and h.numel() > 3:
            h = h.view(len(keep), -1)
            for w, d in brute_force.categorical_labels(
                h[keep].flatten(), int(keep.sum()), h.shape[1]
            ):
                full = torch.zeros_like(h)
                full[keep] = d.view(-1, h.shape[1])
                yield w, full.flatten()
        elif setting.likelihood == "categorical":
            yield from brute_force.categorical_labels(h, 1, len(h))
        elif setting.likelihood == "bernoulli":
            yield from brute_force.bernoulli_labels(h)
        else:
            yield from brute_force.poisson_labels(h, 40)

    return labels


class Truth(NamedTuple):
    """Of one block of entries, from every input's labels."""

    fisher: Tensor
    """F_ii(x) [B, P]."""
    first: Tensor
    """V1_ii(x) [B, P]."""
    l1: float
    second: Tensor | None = None
    """V2_ii(x)."""
    l2: float = 0.0

    @classmethod
    def of(cls, jacobians, tables, index=None, dense=None):
        fisher, first, l1 = [], [], []
        for j, (w, d) in zip(jacobians, tables, strict=True):
            g = d @ (j if index is None else j[:, index])
            f = w @ g.square()
            matrix = (g * w[:, None]).T @ g
            fisher.append(f)
            first.append(w @ g.pow(4) - f.square())
            l1.append(float(w @ g.square().sum(1).square() - matrix.square().sum()))
        made = cls(torch.stack(fisher), torch.stack(first), mean(l1))
        if dense is None:
            return made
        second = torch.stack([t.v2[index] for t in dense])
        return made._replace(second=second, l2=mean(t.l2(index) for t in dense))

    def values(self, kind, draws, copies):
        """{name: truth, of each entry or of all} of an estimate from copies of the inputs."""
        size = copies * len(self.fisher)
        across = copies * (self.fisher - self.fisher.mean(0)).square().sum(0) / (size - 1)
        norm = float(self.fisher.mean(0).square().sum() - across.sum() / size)
        variance = self.second if kind == "i2" else self.first
        found = {
            "trace": self.fisher.sum(1).mean(),
            "norm_square": norm,
            "total_label_variance": self.l2 if kind == "i2" else self.l1,
            "diagonal": self.fisher.mean(0),
        }
        if kind == "i2" or draws > 1:
            found["label_variance"] = variance.sum(1).mean()
            found["diagonal_label_variance"] = variance.mean(0)
        if draws > 1:
            found |= {"input_variance": across.sum(), "diagonal_input_variance": across}
            found["total_variance"] = across.sum() + variance.sum(1).mean()
        elif kind == "i1":  # one label tells the sum of both, not the parts
            found["total_variance"] = across.sum() + variance.sum(1).mean()
            del found["total_label_variance"]
        else:  # what F varies by over inputs is part of what a pair varies by
            del found["norm_square"]
        return {name: torch.as_tensor(value) for name, value in found.items()}


def probability(setting):
    """Of the likeliest labels, of those kept."""
    h = setting.model(setting.x).detach()
    if setting.likelihood == "categorical":
        p = h.softmax(-1).amax(-1)
        return p[setting.keep] if p.dim() > 1 else p
    return torch.sigmoid(h.abs()) if setting.likelihood == "bernoulli" else (-h.exp()).exp()


def collect(estimate, names, seen):
    """The numbers of one report, entries one after another."""
    for name in names:
        if name == "norm_square":
            value = estimate.pair_variance.norm_square
        else:
            value = getattr(estimate, name)
        if isinstance(value, dict):
            value = torch.cat([v.flatten() for v in value.values()])
        seen.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float64))


def check(seen, want, where):
    """All means within few standard errors, which are small."""
    told = most = 0
    for name, values in seen.items():
        x = torch.stack(values)
        error = x.std(0) / len(x) ** 0.5
        most_off = limit(len(x)) * error + 1e-9 * want[name].abs() + 1e-18
        off = (x.mean(0) - want[name]).abs()
        assert bool((off <= most_off).all()), (where, name, x.mean(0), want[name], error)
        told += int((error <= 0.2 * want[name].abs()).sum())
        most += want[name].numel()
    return told, most


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *((n, 2) for n in MAKERS),
        ("tokens", 1),
        *(pytest.param(n, d, marks=pytest.mark.long) for n, d in (("poisson", 1), ("tokens", 3))),
    ],
)
@pytest.mark.parametrize("sure", [False, True])
def test_moments_of_size_biased_labels_are_unbiased(name, draws, sure):
    setting = MAKERS[name](sure)
    p = probability(setting)
    assert float(p.min()) > 0.99 and 0.997 < float(p.mean()) < 0.9999 if sure else p.min() < 0.8
    model, x, times = setting.model, setting.x, setting.copies
    dense = [brute_force.Dense(model, (x,), b, labels_of(setting, b)) for b in range(len(x))]
    tables = [(t.weights, t.scores) for t in dense]
    jacobians = [t.jacobian for t in dense]
    groups = brute_force.groups(model)
    truth = {key: Truth.of(jacobians, tables, index, dense) for key, index in groups.items()}
    hidden = []
    for b in range(len(x)):
        inner = model[:2](x[b : b + 1]).detach()
        j = torch.autograd.functional.jacobian(model[2], inner)
        hidden.append(j.reshape(-1, inner.numel()))
    activation = Truth.of(hidden, tables)
    mask = None
    if name != "categorical":
        mask = setting.keep.repeat(times, *[1] * (setting.keep.dim() - 1))
    copies, plan, seen = x.repeat(times, *[1] * (x.dim() - 1)), Plan(), {}
    for seed in range(SEEDS):
        report = fimprobe.measure(
            model,
            copies,
            likelihood=setting.likelihood,
            mask=mask,
            draws=draws,
            diagonals=True,
            seed=seed,
            plan=plan,
        )
        assert report.label_sampling == "size_biased" and report.seen_mass is None
        for key in groups:
            for kind in ("i1", "i2"):
                names = truth[key].values(kind, draws, times)
                e = getattr(brute_force.group_of(report, key), kind)
                if draws == 1:
                    assert e.input_variance is None
                    assert (
                        (e.label_variance is None) == (kind == "i1") == (e.pair_variance is not None)
                    )
                collect(e, names, seen.setdefault((key, kind), {}))
        names = [n for n in activation.values("i1", draws, times) if not n.startswith("diagonal")]
        collect(report.layers["2"].activation, names, seen.setdefault("activation", {}))
        assert report.layers["0"].activation is None
    told = most = 0
    for where, values in seen.items():
        if where == "activation":
            want = activation.values("i1", draws, times)
        else:
            want = truth[where[0]].values(where[1], draws, times)
        counts = check(values, want, where)
        told, most = told + counts[0], most + counts[1]
    assert told >= 0.6 * most, (told, most)
    known = {n for values in seen.values() for n in values}
    assert len(known) == (9 if draws > 1 else 7)


@pytest.mark.parametrize("name", MAKERS)
def test_a_sure_model_needs_no_luck(name):
    """Over seeds the trace varies far less than with labels from the model, about the same mean."""
    setting = MAKERS[name](sure=True)
    plan, spread = Plan(), {}
    exact = fimprobe.measure(
        setting.model, setting.x, likelihood=setting.likelihood, draws="exact", estimators=("i1",)
    ).total.i1.trace
    for sampling in ("size_biased", "model"):
        traces = torch.tensor(
            [
                fimprobe.measure(
                    setting.model,
                    setting.x,
                    likelihood=setting.likelihood,
                    label_sampling=sampling,
                    estimators=("i1",),
                    bounds=False,
                    draws=2,
                    seed=seed,
                    plan=plan,
                ).total.i1.trace
                for seed in range(60)
            ]
        )
        spread[sampling] = float((traces - exact).square().mean().sqrt()) / exact
    assert spread["size_biased"] < 0.5 and spread["model"] > 0.9
    assert spread["size_biased"] < 0.3 * spread["model"], spread


@pytest.mark.parametrize("outputs", ["one", "two classes"])
@pytest.mark.parametrize("bias", [0.0, 5.0, 30.0])
def test_one_binary_label_is_exact_whatever_is_drawn(outputs, bias):
    """Of two labels the scores differ by their sign and weight only: √w δ = ±√τ."""
    torch.manual_seed(1)
    model = lively(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1 + (outputs != "one"))))
    towards(model, [bias] if outputs == "one" else [bias, 0.0])
    x = torch.randn(6, 3)
    options = {"likelihood": "bernoulli" if outputs == "one" else "categorical", "diagonals": True}
    exact = fimprobe.measure(model, x, draws="exact", **options).total.i1
    for draws in (1, 2):
        for seed in range(3):
            have = fimprobe.measure(model, x, draws=draws, seed=seed, **options).total.i1
            for kind in ("trace", "norm", "std_error", "rel_error"):
                assert getattr(have, kind) == pytest.approx(getattr(exact, kind), rel=1e-9), kind
            for n, want in exact.diagonal.items():
                assert torch.allclose(have.diagonal[n], want, rtol=1e-9, atol=0)
